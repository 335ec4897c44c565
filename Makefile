# Two commands do everything on a machine with Python 3.11 or newer: `make lab` and `make test`.

VENV     := .venv
RUN      := $(VENV)/bin/python
READY    := $(VENV)/.ready
WORKERS  ?= 2
LAB_ARGS ?=
# Models of the lab on the site. Of all, reading off the laws takes hours: make site SITE_ARGS=
SITE_ARGS ?= --models tiny mini
NOTEBOOK := notebooks/00_start_here.ipynb
NBVAL    := -p tests.project.kernels --nbval-lax --nbval-current-env --nbval-cell-timeout=180 --nbval-kernel-startup-timeout=120
PARALLEL := -n $(WORKERS) --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.NOTPARALLEL:
# Compiled modules are kept (in __pycache__): else each of the many processes compiles all of them again.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help env chromium corpus lab lint test test-deep test-gpu check notebooks site picture readme bench clean

help: ## show this list
	@echo "make lab     start the course        make test    check everything"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

env: $(READY) ## make .venv with the pinned packages (again only when the pins changed)

# The first Python of at least 3.11, unless the caller names one: make env PYTHON=/path/to/python3.12
$(READY): pyproject.toml constraints.txt
	@if [ ! -x $(RUN) ]; then \
	  for p in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	    if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$p; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "The course needs Python 3.11 or newer. Found: $$(python3 --version 2>&1 || echo no python3)."; \
	    echo "Install one (python.org, or your system's package manager), or name it: make env PYTHON=/path/to/python3.11"; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$("$$found" --version)"; \
	  "$$found" -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "Python's venv module is missing (on Debian and Ubuntu: apt-get install python3-venv)."; exit 1; }; \
	fi
	$(RUN) -m pip install --quiet --upgrade -c constraints.txt pip
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[course,dev]'
	@touch $@

lab: corpus ## start the course: JupyterLab, opened on chapter 00
	$(RUN) -m jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/$(NOTEBOOK) $(LAB_ARGS)

corpus: env ## build the text pairs from the installed packages (cached)
	$(RUN) -c "from gclib.data.pairs import load_pairs; print(f'{len(load_pairs()):,} training pairs')"

lint: env ## check style, formatting, links and spelling
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tests/project/texts.py
	@if [ -x $(VENV)/bin/biome ]; then \
	  $(VENV)/bin/biome lint --error-on-warnings --skip=complexity/noImportantStyles gclib/course tests/helpers; \
	else echo "JavaScript is not linted here: biome comes as a wheel for Linux on x86-64 alone."; fi

# In CI a missing Chromium is installed; elsewhere the browser tests are skipped in words.
chromium:
	@if [ "$$CI" = true ] && ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null \
	  || echo "Chromium could not be installed: the browser tests will be skipped."; \
	fi

test: chromium lint corpus ## check everything: style, unit tests, every notebook, the browser
	$(RUN) -m pytest tests notebooks $(NBVAL) $(PARALLEL)

check: lint ## the quick part of `make test`, some two minutes
	$(RUN) -m pytest tests -m "not slow and not browser" -p no:nbval --hypothesis-profile=quick --durations=10 $(PARALLEL)

test-deep: env ## the property tests with ten times the cases
	$(RUN) -m pytest tests -m "not browser" --hypothesis-profile=deep $(PARALLEL)

test-gpu: env ## the tests that need a CUDA device
	$(RUN) -m pytest tests/gpu

notebooks: corpus ## run every notebook top to bottom, measure it, keep its outputs
	$(RUN) tests/project/texts.py --link
	$(RUN) tests/project/execute.py

site: chromium env ## write the course as a site into _site/, and look at every page of it in a browser
	$(RUN) -m gclib.course.site.build _site $(SITE_ARGS)
	GCLIB_SITE=_site $(RUN) -m pytest tests/browser/test_site.py tests/course/site

picture: env ## draw the README's pictures: two steps' bytes, and the memory lab in a browser
	$(RUN) tests/project/readme.py --picture
	GCLIB_PICTURE=notebooks/images/memory_lab.png $(RUN) -m pytest tests/browser -k memory_lab

readme: env ## fill in what the README says of chapters, files and the sample
	$(RUN) tests/project/readme.py

bench: env ## print the measured times
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(RUN) $$script || exit 1; done

clean: ## remove what was made: environment, caches, corpus (not what a reader solved, predicted or calibrated)
	if [ -d data/cache ] && [ ! -L data/cache ]; then find data/cache/ -type f ! -name exercises.json ! -name predictions.json ! -name 'calibration-*' -delete; fi
	rm -rf $(VENV) _site build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
