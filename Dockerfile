# docker build -t yuan-grpc .                             for CPUs
# docker build -t yuan-grpc:cuda --build-arg EXTRA=cuda . for NVIDIA GPUs

FROM python:3.11-slim-bookworm AS build
ARG EXTRA=cpu
ENV PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /venv
# Install packages before copying the code, so that a code change reuses their layer.
COPY requirements requirements
RUN requirements/install.sh /venv/bin/python "$EXTRA"
COPY pyproject.toml README.md LICENSE ./
COPY yuan_grpc yuan_grpc
RUN /venv/bin/pip install --no-deps .

FROM python:3.11-slim-bookworm
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
