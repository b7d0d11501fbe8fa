# The image holds Python, server.py and the packages of requirements.txt; no pip, no compiler.
# It runs read-only and without capabilities:
#   docker run --read-only --cap-drop=ALL --security-opt=no-new-privileges -p 8080:8080 ...

FROM python:3.13-slim AS packages
WORKDIR /build
COPY requirements.txt .
# Compiled here, as the server can write no .pyc files where it runs.
RUN pip install --no-cache-dir --require-hashes --compile --target /packages -r requirements.txt

FROM python:3.13-slim
# MALLOC_MMAP_THRESHOLD_ makes glibc map what is of that size by itself, and unmap it when it is freed.
# Without it, glibc raises the threshold as it goes, and what a flood of large messages took stays with
# the process (mallopt(3)). `python -m tests.hostile` measures with the value that stands here.
ENV PYTHONPATH=/packages \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_MMAP_THRESHOLD_=131072
# The server never installs anything, and what is not there cannot be used against it.
RUN pip uninstall --yes pip && rm -rf /usr/local/lib/python3.13/ensurepip
COPY --from=packages /packages /packages
WORKDIR /app
COPY server.py .
# A number, so that the platform can tell that it is not root.
USER 10001:10001
EXPOSE 8080
# Exec form: Python is process 1 and gets SIGTERM itself. ECS ignores HEALTHCHECK; it asks /live.
CMD ["python", "server.py"]
