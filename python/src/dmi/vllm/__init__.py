"""vLLM, observed: a plugin that vLLM finds by itself where this package is installed. docs/vllm.md is the page.

`plugin` is what vLLM calls; `settings` what it was asked to do; `sites` what a vLLM model has; `hooks` places them;
`batches` says which rows of a step are whose."""
