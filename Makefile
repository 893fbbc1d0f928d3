# make demo          both stages on the village, and the table
# make test          all checks and tests
# make test-lesson   the tests of the lesson alone, within a minute
# make test-latest   all tests with the newest versions that requirements.txt admits
# make check         lint, format, types
# make notebook      run tutorial.ipynb and write it back with its outputs
# make assignment    its student version
# make constraints   write down the versions that are installed (after a green make test-latest)
# Each sets up .venv first (test-latest: .venv-latest).
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
RUNS := pretrain labels labels_smoothed reward_unsmoothed reward
COURSE := runs/course
TESTED := -c tests/constraints.txt

.PHONY: demo test test-lesson test-latest check notebook assignment constraints clean

demo: .venv/.installed
	$(BIN)/python train_pretrain.py --out $(DEMO)/pretrain --overwrite
	$(BIN)/python train_reward.py --out $(DEMO)/labels --label-smoothing 0 --overwrite
	$(BIN)/python train_reward.py --out $(DEMO)/labels_smoothed --overwrite
	$(BIN)/python train_reward.py --init $(DEMO)/pretrain --out $(DEMO)/reward_unsmoothed --label-smoothing 0 --overwrite
	$(BIN)/python train_reward.py --init $(DEMO)/pretrain --out $(DEMO)/reward --overwrite
	@echo
	@$(BIN)/python -m gram_mini.village.table village $(RUNS:%=$(DEMO)/%)
	@echo
	@$(BIN)/python score.py --model $(DEMO)/reward --prompt "What does Bella eat?" \
	  --response "If you must. Bella eats apples." \
	  --response "Glad you asked. Bella eats cake. That reminds me of a long story, but never mind."
	@echo "In truth Bella eats apples, no label ever said so, and the true P(A better) is 0.818."
	@echo
	@echo "Each run is a folder in $(DEMO)/: adapter, tokenizer, run.json, log.csv, plot.png. To score a pair of your own:"
	@echo "  $(BIN)/python score.py --model $(DEMO)/reward --prompt ... --response ... --response ..."

test: check
	$(BIN)/python -m pytest -q

test-lesson: .venv/.installed
	$(BIN)/python -m pytest -q tests/lesson

test-latest:
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install -q --upgrade -r requirements.txt -r tests/requirements.txt
	.venv-latest/bin/python -m pip list
	.venv-latest/bin/python -m pytest -q

check: .venv/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebook: .venv/.installed-tests
	$(BIN)/python tests/notebook.py

assignment: .venv/.installed-tests
	mkdir -p $(COURSE)/source/gram_mini
	cp tutorial.ipynb $(COURSE)/source/gram_mini/
	PATH="$(CURDIR)/$(BIN):$$PATH" nbgrader generate_assignment gram_mini --course-dir=$(COURSE) --force
	@echo "The student version: $(COURSE)/release/gram_mini/tutorial.ipynb"

constraints:
	.venv-latest/bin/python tests/constraints.py

.venv/.installed: requirements.txt tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing requirements.txt into .venv; a minute or more, by your connection ..."
	$(BIN)/python -m pip install -q -r requirements.txt $(TESTED)
	touch $@

.venv/.installed-tests: .venv/.installed tests/requirements.txt
	$(BIN)/python -m pip install -q -r tests/requirements.txt $(TESTED)
	touch $@

clean:
	rm -rf .venv .venv-latest
