# Each target first asks tools/make_env.py for an interpreter with what it needs: the current python3 if that is
# complete, else .venv, made on the first call.
PYTHON ?= python3
ENV = $(PYTHON) tools/make_env.py

.PHONY: demo test lint quality env clean

demo:
	python=$$($(ENV)) && "$$python" single_shot_inference.py --temperature 0.7

# The tests run one thread each; where pytest-xdist is installed, two processes use the second core.
test:
	python=$$($(ENV) pytest transformers) && "$$python" -m pytest $$("$$python" -c "import xdist; print('-n2')" 2>/dev/null)

lint:
	python=$$($(ENV) ruff) && "$$python" -m ruff check .

quality:
	python=$$($(ENV)) && "$$python" tools/quality.py

env:
	$(ENV) pytest transformers ruff

clean:
	rm -rf .venv .build build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
