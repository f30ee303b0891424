# docker build -t yuan-grpc .                             for CPUs
# docker build -t yuan-grpc:cuda --build-arg EXTRA=cuda . for NVIDIA GPUs

# The digest decides, the tag is for the reader. docs/releasing.md says how to update both.
ARG BASE=python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE} AS build
ARG EXTRA=cpu
# Mirrors of PyPI and of PyTorch's index: --build-arg PIP_INDEX_URL=… --build-arg PYTORCH_INDEX_URL=…
ARG PIP_INDEX_URL
ARG PYTORCH_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /venv && python -m venv /build
# Install packages before copying the code, so that a code change reuses their layer.
COPY requirements/install.sh requirements/$EXTRA.txt requirements/build.txt requirements/
RUN requirements/install.sh /venv/bin/python "$EXTRA" && requirements/install.sh /build/bin/python build
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY yuan_grpc yuan_grpc
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . && /venv/bin/pip install --no-deps /dist/*.whl

FROM ${BASE}
# libnuma1: linked by the CPU build of vLLM. g++: used at run time by torch.compile and Triton to build kernels.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home yuan
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH
USER yuan
WORKDIR /home/yuan
EXPOSE 50051
ENTRYPOINT ["yuan-grpc", "serve", "--host", "0.0.0.0"]
