"""Pictures from captions: vocabulary, draft, transformer, sampling, training, and the page's figures."""
