# make demo: both stages on the embedded village and the table.   make test: the tests.   Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test seeds backbone clean

demo: .venv/.installed
	$(BIN)/python train_pretrain.py --out $(DEMO)/pretrain --overwrite
	$(BIN)/python train_reward.py --out $(DEMO)/labels --label-smoothing 0 --overwrite
	$(BIN)/python train_reward.py --out $(DEMO)/labels_smoothed --overwrite
	$(BIN)/python train_reward.py --init $(DEMO)/pretrain --out $(DEMO)/reward_plain --label-smoothing 0 --overwrite
	$(BIN)/python train_reward.py --init $(DEMO)/pretrain --out $(DEMO)/reward --overwrite
	$(BIN)/python -m gram_mini.evaluation embedded $(DEMO)/pretrain $(DEMO)/labels $(DEMO)/labels_smoothed $(DEMO)/reward_plain $(DEMO)/reward
	$(BIN)/python -m gram_mini.world.example $(DEMO)/reward
	@echo "Every run is in $(DEMO)/: adapter, tokenizer, run.json, log.csv, plot.png. Score your own pair with"
	@echo "  $(BIN)/python score.py --model $(DEMO)/reward --prompt ... --response ... --response ..."

test: .venv/.installed-tests
	$(BIN)/python -m pytest -q

.venv/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/.installed-tests: .venv/.installed tests/requirements.txt
	$(BIN)/python -m pip install -q -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv
