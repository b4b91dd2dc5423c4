//! The proxy through which a limited Sprite reaches the network.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use rustls::ClientConfig;
use tokio::{
    io::{AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use types::address::is_public;

use crate::{
    network::{
        CONNECT_MAX, CONNECTIONS_MAX,
        head::{answer, read_head},
        intercept::{self, Interceptor},
        namespace::{connect_inside, inside},
        policy::Policy,
        private_hosts::loopback,
        uplink,
    },
    sync::locked,
};

/// Where the proxy is, as the Sprite sees it.
const PROXY: &str = "127.0.0.1:3128";
pub const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// Names that are looked up for one Sprite at a time. Each takes a thread of the runtime.
const LOOKUPS_MAX: usize = 8;

/// The variables that send all that a Sprite's programs ask for to its proxy.
pub fn proxy_variables() -> impl Iterator<Item = (&'static str, String)> {
    let names = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
    names.into_iter().map(|name| (name, format!("http://{PROXY}"))).chain(https_proxy_variables())
}

/// The variables that send what a Sprite's programs ask for by HTTPS to its proxy.
pub fn https_proxy_variables() -> impl Iterator<Item = (&'static str, String)> {
    let names = ["HTTPS_PROXY", "https_proxy"];
    // Node.js looks at them when told to.
    names
        .into_iter()
        .map(|name| (name, format!("http://{PROXY}")))
        .chain([("NODE_USE_ENV_PROXY", "1".to_owned())])
}

/// The proxy through which a limited Sprite reaches the network, and one with secrets the hosts
/// that get them.
#[derive(Debug)]
pub struct EgressProxy {
    policy: Mutex<Policy>,
    pub(super) interceptor: Arc<Interceptor>,
    pub(super) reach: Reach,
    slots: Arc<Semaphore>,
    lookups: Arc<Semaphore>,
    /// Ends the connections that were made under rules that do not hold any more.
    connections: Mutex<CancellationToken>,
    closed: CancellationToken,
    /// A process in the Sprite's network.
    pid: i32,
    /// The task that accepts; it ends when the proxy is closed, and its connections with it.
    server: Mutex<JoinSet<()>>,
    refusals: Mutex<Refusals>,
}

/// What a server's proxies may reach.
#[derive(Clone, Debug)]
pub struct Reach {
    /// Hosts that may be private addresses: those of the deployment's own services, never what
    /// users name.
    pub private_hosts: Arc<[String]>,
    /// How hosts of secrets prove who they are.
    pub tls: Arc<ClientConfig>,
}

/// What was refused, for the Sprite to read: each host and port once.
#[derive(Debug)]
struct Refusals {
    file: PathBuf,
    hosts: Vec<String>,
}

impl Refusals {
    const HOSTS_MAX: usize = 200;

    fn add(&mut self, host: String) {
        if self.hosts.len() >= Self::HOSTS_MAX || self.hosts.contains(&host) {
            return;
        }
        self.hosts.push(host);
        let text: String = self.hosts.iter().flat_map(|host| [host.as_str(), "\n"]).collect();
        if let Err(error) = std::fs::write(&self.file, text) {
            tracing::debug!(%error, "failed to report a refused connection to the Sprite");
        }
    }
}

impl EgressProxy {
    /// Opens a proxy in the network namespace of a process. Refused connections are appended to a
    /// file, which is empty at first. A stop does not wait for it, and it serves as long as this
    /// process: what runs in the Sprite keeps running meanwhile.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn open(
        pid: i32,
        policy: Policy,
        interceptor: Arc<Interceptor>,
        reach: Reach,
        refusals: PathBuf,
    ) -> io::Result<Arc<Self>> {
        let listener = inside(pid, || {
            let listener = std::net::TcpListener::bind(PROXY)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        std::fs::write(&refusals, "")?;
        let closed = CancellationToken::new();
        let proxy = Arc::new(Self {
            policy: Mutex::new(policy),
            interceptor,
            reach,
            slots: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)),
            connections: Mutex::new(closed.child_token()),
            closed,
            pid,
            server: Mutex::default(),
            refusals: Mutex::new(Refusals { file: refusals, hosts: Vec::new() }),
        });
        locked(&proxy.server).spawn(proxy.clone().serve(TcpListener::from_std(listener)?));
        Ok(proxy)
    }

    /// Puts other rules into force; connections that are open are cut.
    pub fn set_policy(&self, policy: Policy) {
        *locked(&self.policy) = policy;
        std::mem::replace(&mut *locked(&self.connections), self.closed.child_token()).cancel();
    }

    /// Ends all connections; there will be no other.
    pub fn close(&self) {
        self.closed.cancel();
    }

    async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let Some(accepted) = self.closed.run_until_cancelled(listener.accept()).await else {
                return;
            };
            let Ok((client, _)) = accepted else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let Ok(slot) = self.slots.clone().try_acquire_owned() else { continue };
            let (proxy, cut) = (self.clone(), locked(&self.connections).clone());
            connections.spawn(async move {
                let _ = cut.run_until_cancelled(proxy.connection(client)).await;
                drop(slot);
            });
        }
    }

    async fn connection(self: Arc<Self>, mut client: TcpStream) -> io::Result<()> {
        let _ = client.set_nodelay(true);
        let Ok(Ok(Some((request, rest)))) =
            tokio::time::timeout(HEAD_TIME_MAX, read_head(&mut client)).await
        else {
            return answer(
                &mut client,
                "400 Bad Request",
                "not a request that a proxy understands",
            )
            .await;
        };
        let mut server = match self.dial(&request.host, request.port).await {
            Ok(server) => server,
            Err(Refused::Policy) => {
                tracing::info!(
                    host = request.host,
                    port = request.port,
                    "refused by the Sprite's network policy"
                );
                locked(&self.refusals).add(format!("{}:{}", request.host, request.port));
                let why =
                    format!("{} is not allowed by this sandbox's network policy", request.host);
                return answer(&mut client, "403 Forbidden", &why).await;
            }
            Err(Refused::Unreachable(error)) => {
                return answer(
                    &mut client,
                    "502 Bad Gateway",
                    &format!("{} cannot be reached: {error}", request.host),
                )
                .await;
            }
        };
        if request.forward.is_none()
            && let Some(authority) = self.interceptor.authority_for(&request.host, request.port)
        {
            if !rest.is_empty() {
                let why = "a tunnel is used when it was answered";
                return answer(&mut client, "400 Bad Request", why).await;
            }
            let target = (request.host, request.port);
            return intercept::serve(self.clone(), &authority, client, target, server).await;
        }
        match request.forward {
            None => client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?,
            Some(head) => server.write_all(&head).await?,
        }
        server.write_all(&rest).await?;
        copy_bidirectional(&mut client, &mut server).await.map(|_| ())
    }

    pub async fn dial(&self, host: &str, port: u16) -> Result<TcpStream, Refused> {
        let private_hosts = &self.reach.private_hosts;
        let named = private_hosts.iter().any(|own| *own == format!("{host}:{port}"));
        if let Some(loopback) = loopback(host).filter(|_| !named) {
            let connected = tokio::time::timeout(
                CONNECT_MAX,
                connect_inside(self.pid, SocketAddr::new(loopback, port)),
            )
            .await;
            let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            return connected.map_err(|error| Refused::Unreachable(error.to_string()));
        }
        if !locked(&self.policy).allows(host) {
            return Err(Refused::Policy);
        }
        let private_allowed = private_hosts
            .iter()
            .any(|own| own.eq_ignore_ascii_case(host) || *own == format!("{host}:{port}"));
        let unreachable = |error: io::Error| Refused::Unreachable(error.to_string());
        let connect = async {
            let addresses = look_up(&self.lookups, host.trim_matches(['[', ']']), port)
                .await
                .map_err(unreachable)?;
            // An allowed name that leads to this machine or its network is not what was allowed.
            let own = tokio::task::spawn_blocking(uplink::machine_addresses).await;
            let own = own.map_err(|error| unreachable(error.into()))?;
            let is_outside = |address: &SocketAddr| {
                let ip = address.ip().to_canonical();
                is_public(ip) && !own.contains(&ip)
            };
            let addresses: Vec<_> = addresses
                .into_iter()
                .filter(|address| private_allowed || is_outside(address))
                .collect();
            if addresses.is_empty() {
                return Err(Refused::Policy);
            }
            let server = TcpStream::connect(addresses.as_slice()).await.map_err(unreachable)?;
            let _ = server.set_nodelay(true);
            Ok(server)
        };
        tokio::time::timeout(CONNECT_MAX, connect)
            .await
            .unwrap_or_else(|_| Err(Refused::Unreachable("it does not answer".to_owned())))
    }
}

/// What a name leads to. The thread that asks is busy until the system's resolver answers, which
/// may be long after its connection was given up: it keeps the Sprite's slot for as long.
async fn look_up(slots: &Arc<Semaphore>, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
    let host = host.to_owned();
    let found = tokio::task::spawn_blocking(move || {
        let _slot = slot;
        Ok((host.as_str(), port).to_socket_addrs()?.collect())
    });
    found.await.map_err(io::Error::other)?
}

pub enum Refused {
    Policy,
    Unreachable(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_is_looked_up_when_the_sprites_other_lookups_have_ended() {
        let slots = Arc::new(Semaphore::new(1));
        let held = slots.clone().acquire_owned().await.unwrap();
        assert!(
            tokio::time::timeout(Duration::from_millis(50), look_up(&slots, "localhost", 1))
                .await
                .is_err()
        );
        drop(held);
        let found = look_up(&slots, "localhost", 1).await.unwrap();
        assert!(
            found.iter().all(|address| address.ip().is_loopback() && address.port() == 1)
                && !found.is_empty()
        );
        assert_eq!(slots.available_permits(), 1);
    }
}
