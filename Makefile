# The two commands: `make demo` and `make test`. Each sets everything up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
MESH ?= examples/fox_cub.glb
PROMPT ?= the fox is running
OUT ?= out/demo
SHELL := /bin/bash

.PHONY: setup demo test lint extension benchmarks clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml tools/system_packages.sh
	@[ "$$(uname)" != Linux ] || tools/system_packages.sh $(PYTHON)
	@echo "Installing into $(VENV) (about two minutes, 3 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python tools/build_extension.py --wheels-only
	$(BIN)/track4d doctor
	@touch $@

demo: setup
	@mkdir -p $(OUT)
	$(BIN)/track4d animate "$(MESH)" --prompt "$(PROMPT)" -o $(OUT)/animated.glb -o $(OUT)/animated.blend \
	  --preview $(OUT)/preview.webp --sheet $(OUT)/contact_sheet.png --report $(OUT)/report.json
	@echo
	@echo "Look at $(OUT)/preview.webp or open $(OUT)/animated.blend in Blender and press space."
	@echo "Next: make demo MESH=your.glb PROMPT=\"your sentence\", or make extension and install dist/*.zip in Blender."

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup lint
	$(BIN)/python -m pytest

extension: setup
	$(BIN)/python tools/build_extension.py

benchmarks: setup
	$(BIN)/python benchmarks/rasterise.py
	$(BIN)/python benchmarks/generator.py
	$(BIN)/python benchmarks/recover.py
	$(BIN)/python benchmarks/service.py

clean:
	rm -rf build dist out
