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
ARG VERSION=0.2.0
LABEL org.opencontainers.image.title="yuan-grpc" \
      org.opencontainers.image.description="A gRPC service that generates text with Yuan 2.0 models on vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.16-slim-bookworm"
# libnuma1: linked by the CPU build of vLLM. g++: used at run time by torch.compile and Triton to build kernels.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home yuan \
 && install --directory --owner yuan --group yuan --mode 700 /home/yuan/.cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH
# A number, so that Kubernetes can verify that it is not root.
USER 10001:10001
WORKDIR /home/yuan
# Downloads of the hub, and compiled code.
VOLUME /home/yuan/.cache
EXPOSE 50051
# A model may load for half an hour.
HEALTHCHECK --start-period=30m --start-interval=2s --interval=10s --timeout=5s --retries=3 \
  CMD ["yuan-grpc", "probe", "readiness"]
ENTRYPOINT ["yuan-grpc", "serve", "--host", "0.0.0.0"]
