"""What a person runs: ``python -m pipelines.NAME --help``."""


def quiet_libraries() -> None:
    """Keep the libraries' loading bars and notices (truncated T5 prompts, optional packages) out of a command's output."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
