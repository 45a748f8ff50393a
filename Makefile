.PHONY: check test test-gpu bench bench-gpu docs

check: ## the gate before each commit: format, lint, types, fast tests
	uv run ruff format --check .
	uv run ruff check .
	uv run pyright
	uv run pytest -q -m "not slow and not gpu"

test: ## everything that needs no GPU
	uv run pytest --all-seeds -m "not gpu"

test-gpu: ## on a machine with a CUDA device
	uv run pytest -n 0 -m gpu

bench: ## ratios measured side by side in one run, on the CPU
	uv run tools/bench.py

bench-gpu: ## the same on a CUDA device
	uv run tools/bench.py --device cuda

docs: ## the code blocks of the pages run; links and commands exist
	uv run pytest -q tests/test_docs.py
