# docker build -f docker/ascend.Dockerfile -t tuckerize:ascend .
# docker run --rm --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm \
#   --device /dev/hisi_hdc -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro \
#   -v "$PWD:/data" tuckerize:ascend doctor
# CANN and torch_npu belong together: the table is CANN_BY_TORCH_NPU in tuckerize/ascend/environment.py.
ARG CANN=8.5.0-910b-ubuntu22.04-py3.11
FROM quay.io/ascend/cann:${CANN}
ARG TORCH=2.9.0
ARG TORCH_NPU=2.9.0
RUN pip install --no-cache-dir torch==${TORCH} torch_npu==${TORCH_NPU}
COPY pyproject.toml README.md LICENSE /opt/tuckerize/
COPY tuckerize /opt/tuckerize/tuckerize
COPY recipes /opt/tuckerize/recipes
RUN pip install --no-cache-dir '/opt/tuckerize[texts]'
WORKDIR /data
# CANN's variables are set by its own script, in every shell.
ENTRYPOINT ["bash", "-c", "source /usr/local/Ascend/ascend-toolkit/set_env.sh && exec tuckerize \"$@\"", "--"]
