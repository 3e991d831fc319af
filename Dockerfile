# Two images: `docker build --target cpu .` and `docker build --target gpu .`
# Packages are installed into /usr/local, not into a virtual environment: KubeRay starts Ray through
# a shell that may reset PATH. Our own four packages are in /app, on PYTHONPATH.

FROM python:3.12-slim-bookworm AS base
ENV PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Dependencies follow from pyproject.toml alone, so that a change of our code reuses this layer.
FROM base AS requirements
WORKDIR /build
COPY pyproject.toml LICENSE ./
RUN touch README.md

FROM requirements AS requirements-cpu
# Versions are those of pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '.[otel]'

FROM requirements AS requirements-gpu
# PyTorch's wheels carry CUDA and Triton, which compiles our kernels at start.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[otel]'

# Our code and the user; the shape both images share.
FROM base AS app
RUN groupadd --gid 1000 lockstep \
 && useradd --uid 1000 --gid 1000 --create-home lockstep
COPY deployments /app/deployments
COPY workers /app/workers
COPY parallel /app/parallel
COPY kernels /app/kernels
RUN python -m compileall -q /app
WORKDIR /home/lockstep

FROM app AS cpu
COPY --from=requirements-cpu /usr/local /usr/local
USER 1000:1000
HEALTHCHECK NONE
ENTRYPOINT ["lockstep"]

FROM app AS gpu
# Triton compiles small parts for the host with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=requirements-gpu /usr/local /usr/local
USER 1000:1000
HEALTHCHECK NONE
ENTRYPOINT ["lockstep"]
