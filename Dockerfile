# An image for the nodes of a cluster: Ray's own image of the pinned version, with rayfed in its Python, so that a node
# installs nothing when it starts. For clusters without GPUs: `--build-arg VARIANT=py311-cpu`. Untested.
#
#     docker build --tag REGISTRY/rayfed:0.1.0 . && docker push REGISTRY/rayfed:0.1.0
ARG VARIANT=py311-gpu
FROM rayproject/ray:2.60.0-${VARIANT}

# The dependencies are a layer of their own, of gigabytes, that stays as it is when only rayfed changes.
RUN mkdir --parents /tmp/rayfed/configs
WORKDIR /tmp/rayfed
COPY --chown=ray pyproject.toml setup.py constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir --constraint constraints.txt '.[minilm,report,optuna]' && pip uninstall --yes rayfed

COPY --chown=ray rayfed rayfed
COPY --chown=ray configs configs
RUN pip install --no-cache-dir --no-deps .
WORKDIR /home/ray
