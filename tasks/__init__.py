"""One Prefect task per stage: fetch a reference, call the library, store a reference, record the report."""
