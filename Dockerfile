# The base is plain Python: torch's wheels bring CUDA, cuDNN and NCCL, and the host brings the driver. docs/containers.md
FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/scaleprog
ENV PATH=/opt/scaleprog/bin:$PATH
WORKDIR /source
COPY requirements.lock .
# DeepSpeed comes as source; the lock's setuptools builds it, and nothing that the lock does not name.
RUN sed -n '/^setuptools==/,$p' requirements.lock > setuptools.lock && pip install --require-hashes --requirement setuptools.lock
RUN pip install --require-hashes --no-build-isolation --requirement requirements.lock
COPY . .
RUN pip install --no-deps --no-build-isolation . && pip check

FROM python:3.11-slim
# Triton (sharding.compile) and DeepSpeed on CPUs compile at run time.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 scaleprog
COPY --from=build /opt/scaleprog /opt/scaleprog
ENV PATH=/opt/scaleprog/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER scaleprog
WORKDIR /home/scaleprog
RUN scaleprog --version
ENTRYPOINT ["scaleprog"]
