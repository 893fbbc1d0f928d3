# make demo   both stages on the embedded village, and the table
# make test   the tests
# make notebook     run tutorial.ipynb and write it back with its outputs
# make assignment   its student version
# Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
RUNS := pretrain labels labels_smoothed reward_unsmoothed reward

COURSE := runs/course

.PHONY: demo seeds test notebook assignment clean

demo: .venv/.installed
	$(BIN)/python train_pretrain.py --out $(DEMO)/pretrain --overwrite
	$(BIN)/python train_reward.py --out $(DEMO)/labels --label-smoothing 0 --overwrite
	$(BIN)/python train_reward.py --out $(DEMO)/labels_smoothed --overwrite
	$(BIN)/python train_reward.py --init $(DEMO)/pretrain --out $(DEMO)/reward_unsmoothed --label-smoothing 0 --overwrite
	$(BIN)/python train_reward.py --init $(DEMO)/pretrain --out $(DEMO)/reward --overwrite
	@echo
	@$(BIN)/python -m gram_mini.evaluation embedded $(RUNS:%=$(DEMO)/%)
	@echo
	@$(BIN)/python score.py --model $(DEMO)/reward --prompt "What does Bella eat?" \
	  --response "If you must. Bella eats apples." \
	  --response "Glad you asked. Bella eats cake. That reminds me of a long story, but never mind."
	@echo "In truth Bella eats apples, no label ever said so, and the true P(A better) is 0.818."
	@echo
	@echo "Each run is a folder in $(DEMO)/: adapter, tokenizer, run.json, log.csv, plot.png. To score a pair of your own:"
	@echo "  $(BIN)/python score.py --model $(DEMO)/reward --prompt ... --response ... --response ..."

# The demo's table over five other seeds of labels, pairs, data order and adapters: about 25 minutes.
seeds: .venv/.installed
	for seed in 1 2 3 4 5; do \
	  out=runs/seeds/$$seed; \
	  $(BIN)/python train_pretrain.py --seed $$seed --out $$out/pretrain --overwrite && \
	  $(BIN)/python train_reward.py --seed $$seed --out $$out/labels --label-smoothing 0 --overwrite && \
	  $(BIN)/python train_reward.py --seed $$seed --out $$out/labels_smoothed --overwrite && \
	  $(BIN)/python train_reward.py --seed $$seed --init $$out/pretrain --out $$out/reward_unsmoothed --label-smoothing 0 --overwrite && \
	  $(BIN)/python train_reward.py --seed $$seed --init $$out/pretrain --out $$out/reward --overwrite || exit 1; \
	done
	$(BIN)/python -m gram_mini.evaluation embedded $(foreach run,$(RUNS),$(patsubst %,runs/seeds/%/$(run),1 2 3 4 5))

test: .venv/.installed-tests
	$(BIN)/python -m pytest -q

notebook: .venv/.installed-tests
	$(BIN)/python tests/notebook.py

assignment: .venv/.installed-tests
	mkdir -p $(COURSE)/source/gram_mini
	cp tutorial.ipynb $(COURSE)/source/gram_mini/
	PATH="$(CURDIR)/$(BIN):$$PATH" nbgrader generate_assignment gram_mini --course-dir=$(COURSE) --force
	@echo "The student version: $(COURSE)/release/gram_mini/tutorial.ipynb"

.venv/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing requirements.txt into .venv; a minute or more, by your connection ..."
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/.installed-tests: .venv/.installed tests/requirements.txt
	$(BIN)/python -m pip install -q -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv
