VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin

ITEMS ?= 1 260 1196 1210

.PHONY: recommend quickstart test lint format clean

# What a trained pipeline that comes with the code recommends after these movies: make recommend ITEMS="1 2571"
recommend: $(VENV)/.installed
	$(BIN)/python recommend.py trained_models/decoder_sample --items $(ITEMS) --k 5

# Trains the tokenizer and the retriever on the bundled sample; 7 to 14 minutes on two cores with the installation.
quickstart: $(VENV)/.installed
	$(BIN)/python train_rqvae.py configs/rqvae_sample.gin
	$(BIN)/python train_decoder.py configs/decoder_sample.gin

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n logical --maxprocesses 8

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt $(VENV)/.installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@
