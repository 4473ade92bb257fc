# Two commands set everything up on a machine that has Python 3.10 or later:
#   make demo   builds the small model that ships with the project and lets it write
#   make test   runs the tests (installs torch and transformers, the tests' oracle, first)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_PROMPT := def read_lines(path):

.PHONY: demo demo-vision test check fuzz clean

demo: $(VENV)/.installed
	$(BIN)/ortlm build -i models/tiny-phi3 -o demo-out -p int4 -e cpu --force
	@echo
	@echo '$$ ortlm generate demo-out "$(DEMO_PROMPT)" -n 60'
	@printf '%s' '$(DEMO_PROMPT)'
	@$(BIN)/ortlm generate demo-out '$(DEMO_PROMPT)' -n 60
	@echo
	@echo '$$ ortlm generate demo-out --chat "What does os.path.join do?" -n 80'
	@$(BIN)/ortlm generate demo-out --chat 'What does os.path.join do?' -n 80 -v

# The way through for a model that sees pictures: a checkpoint of Phi-3.5-vision's structure, tiny and with random
# weights, so that its answer means nothing.
demo-vision: $(VENV)/.tested
	$(BIN)/python -m tests.vision.checkpoint demo-vision-out/checkpoint
	$(BIN)/ortlm build -i demo-vision-out/checkpoint -o demo-vision-out/model -p int4 -e cpu --recipe fast --force
	@echo
	@echo '$$ ortlm generate demo-vision-out/model "What is shown?" --image picture.png -n 16 -v'
	@$(BIN)/ortlm generate demo-vision-out/model 'What is shown?' -n 16 -v \
		--image demo-vision-out/checkpoint/picture.png

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2

# Everything that reads what strangers wrote, on damaged input with new seeds, for FUZZ_MINUTES (60).
fuzz: $(VENV)/.tested
	$(BIN)/python -m tests.fuzz

# Format, lint and types, then the tests: what CI runs.
check: $(VENV)/.tested $(VENV)/.linted
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/.linted: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lint]'
	@touch $@

clean:
	rm -rf $(VENV) demo-out demo-vision-out .pytest_cache .mypy_cache .ruff_cache
