# The two commands: `make demo` and `make test`. Each sets everything up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
MESH ?= examples/fox_cub.glb
PROMPT ?= the fox is running
OUT ?= out/demo
SHELL := /bin/bash

# What needs no torch in Blender's Python: where these tests want the real server, they start it with $(VENV)'s.
ADDON_TESTS := $(addprefix tests/addon/test_,apply.py capture.py export.py extension.py gaussian_cloud.py headless.py jobs.py \
  lighting.py panel.py scene_io.py)

.PHONY: setup demo test test-blender42 test-blender45 test-blender52 lint extension benchmarks clean

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

# The add-on's tests in other Blenders, from the oldest to the newest it is made for, each in an environment of its own.
test-blender42: $(VENV)-blender42/.ready
test-blender45: $(VENV)-blender45/.ready
test-blender52: $(VENV)-blender52/.ready
test-blender42 test-blender45 test-blender52: test-blender%: setup
	$(VENV)-blender$*/bin/python -m pytest tests/protocol $(ADDON_TESTS)

$(VENV)-blender42/.ready: BPY = bpy==4.2.* "numpy<2"
$(VENV)-blender45/.ready: BPY = bpy==4.5.* "numpy<2"
$(VENV)-blender42/.ready $(VENV)-blender45/.ready: PYTHON_THERE = $(PYTHON)
$(VENV)-blender52/.ready: BPY = bpy==5.2.*
$(VENV)-blender52/.ready: PYTHON_THERE = $(shell for p in python3.13 $$HOME/.pyenv/versions/3.13*/bin/python; do \
  $$p -c "" 2>/dev/null && echo $$p && break; done)
$(VENV)-blender42/.ready $(VENV)-blender45/.ready $(VENV)-blender52/.ready: $(VENV)-blender%/.ready: pyproject.toml
	@[ -n "$(PYTHON_THERE)" ] || { echo "Blender 5.2 needs Python 3.13: install it, or put python3.13 on the PATH." >&2; exit 1; }
	$(PYTHON_THERE) -m venv $(VENV)-blender$*
	$(VENV)-blender$*/bin/pip install --quiet --disable-pip-version-check $(BPY) pyzmq msgpack typer rich psutil pillow scipy \
	  pytest pytest-timeout hypothesis "setuptools>=77" build
	$(VENV)-blender$*/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

extension: setup
	$(BIN)/python tools/build_extension.py

benchmarks: setup
	$(BIN)/python benchmarks/rasterise.py
	$(BIN)/python benchmarks/generator.py
	$(BIN)/python benchmarks/recover.py
	$(BIN)/python benchmarks/service.py

clean:
	rm -rf build dist out
