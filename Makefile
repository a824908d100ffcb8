# Each target works from a bare clone: the first one run creates .venv and installs into it.
PYTHON ?= python3
VENV := .venv
BIN = $(VENV)/bin

.PHONY: demo tables app screenshots test test-app chromium test-transformers test-lowest lint bench bench-gpu

# glibc gives every large tensor back to the system and clears it anew on the next step; kept, CPU steps are up to twice
# as fast. Other C libraries ignore the two names.
demo tables: export MALLOC_MMAP_THRESHOLD_ = 2000000000
demo tables: export MALLOC_TRIM_THRESHOLD_ = 4000000000
demo: $(VENV)/installed
	$(BIN)/python training/demo.py

# The paper's tables and ablations in miniature, three seeds: hours, in as many pieces as one likes. To be committed.
tables: $(VENV)/installed
	$(BIN)/python training/tables.py
	mkdir -p docs/tables
	cp runs/tables/tables.json runs/tables/tables.md runs/tables/tables.png docs/tables/

# In the browser, with the shipped miniature; SAMCLIP_CHECKPOINT names another one.
app: $(VENV)/installed
	$(BIN)/python demo/app.py

# A process a core with one thread each: more threads than cores, which wait for one another, take several times as long.
test test-app: export OMP_NUM_THREADS = 1
test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# The app in a real Chromium: Debian's, installed where there is none and it can be. Without one, the page's tests skip.
test-app: $(VENV)/installed chromium
	$(BIN)/python -m pytest -rs -m browser tests/test_app.py

# The app's pictures in docs/pictures. To be committed.
screenshots: $(VENV)/installed chromium
	$(BIN)/python -m tests.screenshots

chromium:
	@if ! command -v chromedriver > /dev/null && command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && apt-get install -qq --no-install-recommends chromium chromium-driver > /dev/null || \
		echo 'chromium could not be installed'; \
	fi

# The tests that transformers' own models must pass, over ours. Fetches them once; their marks are not ours.
test-transformers: $(VENV)/installed
	$(BIN)/python -m tests.transformers.sdist
	$(BIN)/python -m pytest -q -rs --disable-warnings -o addopts= -o python_files='*.py' tests/transformers

# Both on the lowest versions that pyproject.toml allows, in .venv-lowest.
test-lowest:
	$(MAKE) test test-transformers VENV=.venv-lowest

# Image encoder and text to masks against transformers' own models, on the CPU and on a GPU.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/inference.py encoder
	$(BIN)/python benchmarks/inference.py text_to_masks

bench-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/inference.py encoder --device cuda --dtype bfloat16 --batch_sizes 1 8 32 --compile
	$(BIN)/python benchmarks/inference.py text_to_masks --device cuda --dtype bfloat16

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv-lowest/installed: PINS = 'torch==2.11.*' 'torchvision==0.26.*' 'transformers==5.17.*' 'accelerate==1.15.*'
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' $(PINS)
	@touch $@
