# Every target does its own set-up: it needs make and python3 (3.11 or later), nothing else.
#
#   PYTHON=python3.13     the interpreter; an environment made with another one is made anew
#   VENV=.venv-3.13       where the environment is, to keep several
#   ARGS=... PYTEST_ARGS=...   arguments for the demo, for pytest

VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
LOWEST := .venv-lowest
BENCH ?= .venv-bench
# The demo runs in the developers' environment where that is there; else what it needs is enough.
DEMO := $(if $(wildcard $(VENV)/.installed),$(VENV),.venv-demo)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-availability test-lowest test-next soak soak-cache soak-requests chaos lint format bench bench-distance bench-instructions bench-loops bench-requests bench-profile compat compat-fast compat-redirected compat-verify compat-requests compat-apps compat-count compat-matrix docs pictures build clean FORCE

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' Makefile
	@echo; sed -n 's/^#   //p' Makefile

install: $(VENV)/.installed  ## put the package, the demo's and the developers' tools into .venv

demo: $(DEMO)/.installed  ## show asyncorm beside Django's own async methods, on real data
	$(DEMO)/bin/python -m demo $(ARGS)

test: $(VENV)/.installed  ## run the tests
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-lowest: $(LOWEST)/.installed  ## run the tests on the lowest versions of what we depend on
	$(LOWEST)/bin/python -m pytest $(PYTEST_ARGS)

test-next: $(VENV)/.installed  ## run them on pre-releases and on every Python here; reports, never fails
	$(VENV)/bin/python -m compat.next $(PYTEST_ARGS)

soak: $(VENV)/.installed  ## 10,000 random programs against the model, 20,000 random querysets (SEED=...)
	ASYNCORM_MODEL_PROFILE=soak ASYNCORM_MODEL_SEED=$(or $(SEED),$(shell date +%s)) \
		$(VENV)/bin/python -m pytest -s -o faulthandler_timeout=0 tests/transactions/test_model.py \
		tests/bridge/test_random_queries.py $(PYTEST_ARGS)

soak-cache: $(VENV)/.installed  ## a million hits of the statement cache, each compared with Django's compiler (HITS=, SEED=)
	ASYNCORM_VERIFIED_HITS=$(or $(HITS),1000000) ASYNCORM_MODEL_SEED=$(or $(SEED),$(shell date +%s)) \
		$(VENV)/bin/python -m pytest -o faulthandler_timeout=0 \
		tests/bridge/test_random_queries.py -k hits_of_many_values $(PYTEST_ARGS)

soak-requests: $(VENV)/.installed  ## 10,000 requests that start no thread, 10,000 cancelled at random
	$(VENV)/bin/python -m tests.storms $(or $(COUNT),10000) $(or $(SEED),$(shell date +%s))

chaos: $(VENV)/.installed  ## have a bank survive faults for minutes, write docs/reliability.md
	$(VENV)/bin/python -m tests.chaos $(ARGS)

test-availability: $(VENV)/.installed  ## have a primary fail under load in each set-up (ARGS=--write: docs/reliability.md)
	$(VENV)/bin/python -m tests.availability $(ARGS)

lint: $(VENV)/.installed  ## check style, format, types and which way the modules import
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed  ## put the code into shape
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(BENCH)/.installed  ## measure beside bare drivers and other ORMs (ARGS=--quick: 2 minutes)
	$(BENCH)/bin/python -m compat.bench $(ARGS)

bench-distance: $(VENV)/.installed  ## measure multiplexing, batch() and COPY, near and 2 ms away
	$(VENV)/bin/python -m compat.bench.distance $(ARGS)

bench-instructions: $(VENV)/.installed  ## count the instructions of operations (valgrind), against the kept ones
	$(VENV)/bin/python -m compat.bench.instructions $(ARGS)

bench-loops: $(VENV)/.installed  ## measure async_to_sync() of one aget(), against Django's own
	$(VENV)/bin/python -m compat.bench.loops $(ARGS)

bench-requests: $(BENCH)/.installed  ## measure whole requests: a default project under both handlers
	$(BENCH)/bin/python -m compat.bench.web $(ARGS)

bench-profile: $(BENCH)/.installed  ## show where the microseconds of a native get go
	$(BENCH)/bin/python -m compat.bench --profile

COMPAT = $(VENV)/bin/python -m compat.environment $(if $(DJANGO),--django $(DJANGO))
KEEP = $(if $(APPS),,--results)

compat: $(VENV)/.installed  ## run Django's own test suite natively (DJANGO=5.2|6.0|6.1 APPS="queries ...")
	$(COMPAT) $(KEEP) $(APPS)

compat-fast: $(VENV)/.installed  ## run the part of Django's test suite that is about the ORM
	$(COMPAT) --fast

compat-redirected: $(VENV)/.installed  ## run that part with synchronous calls sent through their a* twins
	$(COMPAT) --fast --redirect $(KEEP) $(APPS)

compat-verify: $(VENV)/.installed  ## run Django's suite and the apps', comparing each hit of the statement cache
	$(COMPAT) --verify $(ARGS) $(APPS)
	$(if $(APPS),,$(COMPAT) --suite apps --verify)

compat-requests: $(VENV)/.installed  ## run its tests of handlers with requests through asyncorm's own handler
	$(COMPAT) --requests $(KEEP) $(APPS)

compat-apps: $(VENV)/.installed  ## run the test suites of other people's apps (APPS="django-filter ...")
	$(COMPAT) --suite apps $(KEEP) $(APPS)

compat-count: $(VENV)/.installed  ## count in those suites what recorded querysets catch, and why not the rest
	$(COMPAT) --suite apps --count $(APPS)

compat-matrix: $(VENV)/.installed  ## run all that for each Django on its oldest and newest Python here
	$(VENV)/bin/python -m compat.matrix

docs: $(VENV)/.installed  ## make a site of docs/ in build/docs, any warning being an error
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "Open build/docs/index.html"

pictures: $(VENV)/.installed  ## draw the timelines in docs/pictures by running the demo
	$(VENV)/bin/python -m demo --pictures docs/pictures $(ARGS)

build: $(VENV)/.installed  ## build wheel and source distribution into dist/
	$(VENV)/bin/python -m build

clean:  ## remove everything that make made
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find asyncorm demo examples tests -name __pycache__ -type d -exec rm -rf {} +

# An environment serves as it is, unless it is broken or PYTHON names another interpreter.
IDENTITY := -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null
stale = $(shell is=$$($(1)/bin/python $(IDENTITY)); \
	test -n "$$is" && test "$$is" = "$$($(or $(PYTHON),$(1)/bin/python) $(IDENTITY))" || echo FORCE)

BENCH_FILES := $(addprefix compat/bench/,install.py requirements.txt peers.txt)

$(BENCH)/.installed: pyproject.toml $(BENCH_FILES) $(call stale,$(BENCH))
	@$(if $(filter FORCE,$^),$(create),:)
	@echo "Installing asyncorm and the benchmark's peers into $(@D) (once, a minute or so) ..."
	@$(@D)/bin/python compat/bench/install.py $(@D)/missing-peers.json
	@touch $@

NEEDS := import sys; sys.exit(sys.version_info < (3, 11) and "asyncorm needs Python 3.11 or later, \
this is " + sys.version.split()[0] + ": name another interpreter with PYTHON=...")

$(LOWEST)/.installed: CONSTRAINTS := -c tests/lowest.txt
$(LOWEST)/.installed: tests/lowest.txt $(call stale,$(LOWEST))
$(VENV)/.installed: $(call stale,$(VENV))
.venv-demo/.installed: $(call stale,.venv-demo)
EXTRAS := demo,dev
.venv-demo/.installed: EXTRAS := demo
$(sort $(VENV)/.installed $(LOWEST)/.installed .venv-demo/.installed): pyproject.toml
	@$(if $(filter FORCE,$^),$(create),:)
	@printf 'Installing asyncorm and $(if $(filter demo,$(EXTRAS)),what the demo needs,its tools) into $(@D) (once) '
	@{ PYTHONUNBUFFERED=1 $(@D)/bin/python -m pip install --disable-pip-version-check --no-input \
		-e '.[$(EXTRAS)]' $(CONSTRAINTS) 2>$(@D)/.errors; echo $$? >$(@D)/.status; } | \
		while read -r word rest; do case $$word in Collecting) printf .;; esac; done; \
		echo; test "$$(cat $(@D)/.status)" = 0 || { cat $(@D)/.errors >&2; exit 1; }
	@touch $@

# Nothing is removed that is not a virtual environment, and no half-made one stays.
define create
set -e; $(or $(PYTHON),python3) -c '$(NEEDS)'; \
if test -e $(@D) && ! test -f $(@D)/pyvenv.cfg; then \
	echo "$(@D) is there and is not a virtual environment: choose another with VENV=..." >&2; exit 1; \
fi; \
rm -rf $(@D); $(or $(PYTHON),python3) -m venv $(@D) || { rm -rf $(@D); exit 1; }
endef
