# One image per service: `docker build --target gateway .` Every service runs as user 65532 and writes nothing to its own file system.
ARG RUST_VERSION=1.95

# The web console, which the gateway embeds. Its build tool wants a newer Node.js than Debian 12 has.
FROM debian:bookworm-slim AS console
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates nodejs npm
WORKDIR /src
COPY scripts/versions.env /tmp/
RUN . /tmp/versions.env && case $(uname -m) in aarch64) arch=arm64 ;; *) arch=x64 ;; esac && \
    npm install --prefix .venv/node --no-fund --no-audit "node-linux-$arch@$NODE_VERSION" && \
    ln -s node_modules/node-linux-$arch/bin/node .venv/node/node
# Node.js trusts what the base image trusts, such as a company's proxy.
ENV NODE_USE_SYSTEM_CA=1
COPY scripts/console.sh scripts/
COPY docs/openapi.json docs/
COPY console console
RUN scripts/console.sh

FROM rust:${RUST_VERSION}-slim-bookworm AS build
# `dev` builds in a third of the time.
ARG PROFILE=release
WORKDIR /src
COPY . .
COPY --from=console /src/console/dist console/dist
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --locked --profile "$PROFILE" --bins && \
    mkdir /out && \
    for name in gateway auth credential-vault scheduler sprite-runner model-gateway local-sprites scripted-model aod; do \
        install -s target/$([ "$PROFILE" = dev ] && echo debug || echo "$PROFILE")/$name /out/; \
    done && \
    # Runs inside of sandboxes, whatever libc those have.
    install "$(cargo run --locked --quiet --package xtask -- agent-host)" /out/

FROM debian:bookworm-slim AS runtime
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 65532 aod && useradd --uid 65532 --gid aod --no-create-home --shell /usr/sbin/nologin aod && \
    install -d -o aod -g aod /var/lib/aod/files
ENV AOD_ADMIN_ADDR=0.0.0.0:9464
USER 65532:65532

FROM runtime AS gateway
COPY --from=build /out/gateway /usr/local/bin/
ENV AOD_LISTEN_ADDR=0.0.0.0:8777
EXPOSE 8777 9464
ENTRYPOINT ["gateway"]

FROM runtime AS auth
COPY --from=build /out/auth /usr/local/bin/
EXPOSE 9464
ENTRYPOINT ["auth"]

FROM runtime AS credential-vault
COPY --from=build /out/credential-vault /usr/local/bin/
EXPOSE 9464
ENTRYPOINT ["credential-vault"]

FROM runtime AS scheduler
COPY --from=build /out/scheduler /usr/local/bin/
EXPOSE 9464
ENTRYPOINT ["scheduler"]

FROM runtime AS sprite-runner
COPY --from=build /out/sprite-runner /out/agent-host /usr/local/bin/
EXPOSE 9464
ENTRYPOINT ["sprite-runner"]

FROM runtime AS model-gateway
COPY --from=build /out/model-gateway /usr/local/bin/
ENV AOD_MODEL_GATEWAY_ADDR=0.0.0.0:8780
EXPOSE 8780 9464
ENTRYPOINT ["model-gateway"]

FROM runtime AS scripted-model
COPY --from=build /out/scripted-model /usr/local/bin/
ENV SCRIPTED_MODEL_ADDR=0.0.0.0:8779
EXPOSE 8779
ENTRYPOINT ["scripted-model"]

# The command line: client, operator tool, and what prepares a deployment.
FROM runtime AS aod
COPY --from=build /out/aod /usr/local/bin/
ENTRYPOINT ["aod"]

# The agents' CLIs. "claude codex gemini opencode" are all; gemini wants a newer Node.js than Debian 12 has.
FROM debian:bookworm-slim AS agents
ARG AGENTS=claude
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates nodejs npm
COPY scripts /scripts
RUN /scripts/agents.sh /agents $AGENTS

# What Sprites see as their system, as scripts/rootfs.sh makes it elsewhere: its users are nobody outside of a Sprite.
FROM debian:bookworm-slim AS sprite
RUN apt-get update && \
    apt-get install -y --no-install-recommends \
        bzip2 ca-certificates curl file g++ gcc git iproute2 jq less libc6-dev lsof make nano netcat-openbsd openssh-client patch perl \
        pkg-config procps psmisc python3 python3-pip python3-venv ripgrep unzip util-linux wget xz-utils zip && \
    rm -rf /var/lib/apt/lists/*
COPY scripts/versions.env /tmp/
RUN apt-get update && apt-get install -y --no-install-recommends nodejs npm && . /tmp/versions.env && \
    case $(uname -m) in aarch64) arch=arm64 ;; *) arch=x64 ;; esac && \
    npm install --prefix /tmp/node --no-fund --no-audit "node-linux-$arch@$NODE_VERSION" "npm@$NPM_VERSION" && \
    apt-get purge -y --autoremove nodejs npm && rm -rf /var/lib/apt/lists/* && \
    mkdir -p /usr/local/lib/node_modules && cp /tmp/node/node_modules/node-linux-$arch/bin/node /usr/local/bin/node && \
    cp -R /tmp/node/node_modules/npm /usr/local/lib/node_modules/npm && \
    ln -s ../lib/node_modules/npm/bin/npm-cli.js /usr/local/bin/npm && ln -s ../lib/node_modules/npm/bin/npx-cli.js /usr/local/bin/npx && \
    rm -rf /tmp/* /root/.npm
FROM debian:bookworm-slim AS rootfs
RUN apt-get update && apt-get install -y --no-install-recommends python3
# Below another directory: COPY keeps the owners of what is in a directory, and not the directory's own.
COPY --from=sprite / /made/rootfs
COPY scripts/foreign-owners.py /
RUN cd /made/rootfs && rm -rf dev proc sys && mkdir dev proc sys && python3 /foreign-owners.py /made/rootfs

# A sandbox server makes namespaces, networks and mounts: it runs as root, with SYS_ADMIN, NET_ADMIN and SYS_PTRACE.
FROM debian:bookworm-slim AS local-sprites
RUN apt-get update && \
    apt-get install -y --no-install-recommends \
        bubblewrap ca-certificates e2fsprogs iproute2 mount passt runc util-linux && \
    rm -rf /var/lib/apt/lists/*
COPY --from=build /out/local-sprites /out/agent-host /usr/local/bin/
ENV LOCAL_SPRITES_AGENT_HOST=/usr/local/bin/agent-host
COPY --from=agents /agents /opt/agents
COPY --from=rootfs /made /usr/lib/local-sprites
ENV AOD_ADMIN_ADDR=0.0.0.0:9464 LOCAL_SPRITES_ADDR=0.0.0.0:8778 LOCAL_SPRITES_DATA_DIR=/var/lib/sprites LOCAL_SPRITES_AGENTS_DIR=/opt/agents
VOLUME /var/lib/sprites
EXPOSE 8778 9464
ENTRYPOINT ["local-sprites"]
