"""The serving process: follows a pointer in object storage, verifies, loads, swaps and answers.

Speaks the Open Inference Protocol v2 over REST. Knows neither Prefect nor MLflow: it starts and keeps serving when
both are down.
"""
