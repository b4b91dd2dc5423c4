//! Network policies of Sprites (docs/sprites-api.md §8.1).
//!
//! A Sprite with rules has a network namespace of its own, in which there is nothing but a proxy:
//! its environment names it (`HTTP_PROXY`, `HTTPS_PROXY`), and what goes another way has no route.
//! The proxy listens inside of the namespace and connects outside of it, by name, where a rule
//! allows that.

mod authority;
pub mod intercept;
pub mod ports;
pub mod substitution;
pub mod uplink;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs as _},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustls::ClientConfig;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use types::address::is_public;

use crate::{network::intercept::Interceptor, sync::locked};

/// Where the proxy is, as the Sprite sees it.
const PROXY: &str = "127.0.0.1:3128";
const HEAD_BYTES_MAX: usize = 32 * 1024;
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
const CONNECT_MAX: Duration = Duration::from_secs(15);
/// Connections of one Sprite at a time.
const CONNECTIONS_MAX: usize = 512;
/// Names that are looked up for one Sprite at a time. Each takes a thread of the runtime.
const LOOKUPS_MAX: usize = 8;
const RULES_MAX: usize = 1000;

/// What development needs: the meaning of `{"include":"defaults"}`.
const DEFAULTS: [&str; 24] = [
    "github.com",
    "*.github.com",
    "*.githubusercontent.com",
    "gitlab.com",
    "registry.npmjs.org",
    "registry.yarnpkg.com",
    "nodejs.org",
    "pypi.org",
    "files.pythonhosted.org",
    "crates.io",
    "*.crates.io",
    "static.rust-lang.org",
    "rubygems.org",
    "*.rubygems.org",
    "proxy.golang.org",
    "sum.golang.org",
    "deb.debian.org",
    "security.debian.org",
    "*.ubuntu.com",
    "registry-1.docker.io",
    "*.docker.io",
    "api.anthropic.com",
    "api.openai.com",
    "generativelanguage.googleapis.com",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Allow,
    Deny,
}

/// A host or a pattern of hosts, or a list that everybody knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Rule {
    Domain { domain: String, action: Action },
    Include { include: String },
}

/// The rules of a Sprite. None at all: everything is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    pub rules: Vec<Rule>,
}

impl Policy {
    pub fn is_limited(&self) -> bool {
        !self.rules.is_empty()
    }

    /// What is wrong with the rules, if anything is.
    pub fn problem(&self) -> Option<String> {
        if self.rules.len() > RULES_MAX {
            return Some(format!("at most {RULES_MAX} rules"));
        }
        self.rules.iter().find_map(|rule| match rule {
            Rule::Include { include } => {
                (include != "defaults").then(|| format!("unknown include {include:?}"))
            }
            Rule::Domain { domain, .. } => {
                let name = domain.strip_prefix("*.").unwrap_or(domain);
                let known = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
                let fine =
                    domain == "*" || (1..=253).contains(&name.len()) && name.chars().all(known);
                (!fine).then(|| format!("invalid domain {domain:?}"))
            }
        })
    }

    /// The exact name wins over a pattern, the longer pattern over the shorter, and unnamed hosts
    /// are refused.
    fn allows(&self, host: &str) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let defaults = DEFAULTS.iter().map(|domain| (*domain, Action::Allow));
        let included = self.rules.iter().any(|rule| matches!(rule, Rule::Include { .. }));
        let own = self.rules.iter().filter_map(|rule| match rule {
            Rule::Domain { domain, action } => Some((domain.as_str(), *action)),
            Rule::Include { .. } => None,
        });
        let matching = own
            .chain(defaults.filter(|_| included))
            .filter_map(|(domain, action)| Some((weight(domain, &host)?, action)));
        // Of equals a refusal wins.
        let best = matching.max_by_key(|(weight, action)| (*weight, *action == Action::Deny));
        best.is_none_or(|(_, action)| action == Action::Allow)
            && (best.is_some() || !self.is_limited())
    }
}

/// How closely a domain of a rule names a host; none if it does not.
fn weight(domain: &str, host: &str) -> Option<usize> {
    let domain = domain.to_ascii_lowercase();
    if domain == "*" {
        return Some(0);
    }
    match domain.strip_prefix('*') {
        Some(suffix) => {
            (host.len() > suffix.len() && host.ends_with(suffix)).then_some(suffix.len())
        }
        None => (domain == host).then_some(usize::MAX),
    }
}

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
    interceptor: Arc<Interceptor>,
    reach: Reach,
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

    async fn dial(&self, host: &str, port: u16) -> Result<TcpStream, Refused> {
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

/// A Sprite's loopback is its own: what a program means by it, where all that it asks for goes
/// through the proxy.
fn loopback(host: &str) -> Option<IpAddr> {
    let host = host.trim_matches(['[', ']']);
    if host.eq_ignore_ascii_case("localhost") {
        return Some(Ipv4Addr::LOCALHOST.into());
    }
    host.parse::<IpAddr>().ok().filter(|address| address.to_canonical().is_loopback())
}

/// Connects from inside of a process's network namespace. Only the socket is made there: a
/// connection that stands still takes no thread.
pub async fn connect_inside(pid: i32, address: SocketAddr) -> io::Result<TcpStream> {
    let make = move || {
        inside(
            pid,
            move || if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() },
        )
    };
    tokio::task::spawn_blocking(make).await.map_err(io::Error::other)??.connect(address).await
}

/// What the deployment names that Sprites reach although it is private, and that is not on the
/// machine's loopback: the server carries connections there, from an address of the Sprite's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    pub host: String,
    port: u16,
    /// Where it is found in a Sprite.
    pub address: Ipv4Addr,
}

impl Forward {
    /// The address is the host's own where it is one, and otherwise one that the Sprite's
    /// `/etc/hosts` gives its name.
    pub fn of(private_hosts: &[String]) -> Vec<Self> {
        let named = private_hosts
            .iter()
            .filter_map(|host| host.rsplit_once(':'))
            .filter(|(host, _)| loopback(host).is_none());
        let named = named.filter_map(|(host, port)| Some((host.to_owned(), port.parse().ok()?)));
        let addressed = named.zip(1u8..).map(|((host, port), number)| {
            let address = host.parse().unwrap_or_else(|_| Ipv4Addr::new(127, 77, 0, number));
            Self { host, port, address }
        });
        addressed.collect()
    }

    /// Listens in the network namespace of a process, until the returned tasks are dropped.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn open_all(forwards: &[Self], pid: i32) -> io::Result<JoinSet<()>> {
        let mut servers = JoinSet::new();
        for forward in forwards {
            let address = SocketAddr::from((forward.address, forward.port));
            let listener = inside(pid, move || {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })?;
            servers.spawn(forward.clone().serve(TcpListener::from_std(listener)?));
        }
        Ok(servers)
    }

    async fn serve(self, listener: TcpListener) {
        let (slots, mut connections) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), JoinSet::new());
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let Ok((mut client, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let (host, port) = (self.host.clone(), self.port);
            connections.spawn(async move {
                let connect = TcpStream::connect((host.as_str(), port));
                if let Ok(Ok(mut server)) = tokio::time::timeout(CONNECT_MAX, connect).await {
                    let _ = (client.set_nodelay(true), server.set_nodelay(true));
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                }
                drop(slot);
            });
        }
    }
}

enum Refused {
    Policy,
    Unreachable(String),
}

/// What is asked of a proxy.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    host: String,
    port: u16,
    /// The head as the server gets it; none where a tunnel is wanted.
    forward: Option<Vec<u8>>,
}

/// The head of a request, and what came behind it.
async fn read_head(client: &mut TcpStream) -> io::Result<Option<(Asked, Vec<u8>)>> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return Ok(parse_head(&bytes).map(|asked| (asked, rest)));
        }
        if bytes.len() > HEAD_BYTES_MAX || client.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    }
}

fn parse_head(head: &[u8]) -> Option<Asked> {
    let head = std::str::from_utf8(head).ok()?;
    let (first, headers) = head.split_once("\r\n")?;
    let [method, target, version] = first.split(' ').collect::<Vec<_>>().try_into().ok()?;
    if method == "CONNECT" {
        let (host, port) = target.rsplit_once(':')?;
        return Some(Asked { host: host.to_owned(), port: port.parse().ok()?, forward: None });
    }
    let url = target.strip_prefix("http://")?;
    let (authority, path) = url.find('/').map_or((url, "/"), |slash| url.split_at(slash));
    let authority = authority.rsplit_once('@').map_or(authority, |(_, authority)| authority);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
            (host, port.parse().ok()?)
        }
        _ => (authority, 80),
    };
    // One request for each connection: the next may be for another host.
    let kept = headers.split("\r\n").filter(|line| {
        let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
        !line.is_empty()
            && !["connection", "proxy-connection", "proxy-authorization", "keep-alive"]
                .contains(&name.as_str())
    });
    let lines: Vec<String> =
        [format!("{method} {path} {version}")].into_iter().chain(kept.map(str::to_owned)).collect();
    let forward = format!("{}\r\nConnection: close\r\n\r\n", lines.join("\r\n"));
    Some(Asked { host: host.to_owned(), port, forward: Some(forward.into_bytes()) })
}

async fn answer(client: &mut TcpStream, status: &str, why: &str) -> io::Result<()> {
    let body = format!("{why}\n");
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    client.write_all(format!("{head}{body}").as_bytes()).await?;
    client.shutdown().await
}

/// The ports of this machine's loopback among the deployment's own hosts.
pub fn loopback_ports(private_hosts: &[String]) -> Vec<u16> {
    let port = |host: &String| {
        let (name, port) = host.rsplit_once(':')?;
        matches!(name, "127.0.0.1" | "localhost").then(|| port.parse().ok()).flatten()
    };
    private_hosts.iter().filter_map(port).collect()
}

/// Makes a socket in a process's network namespace. Sockets stay in the namespace that they were
/// made in.
pub fn inside<T: Send + 'static>(
    pid: i32,
    make: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
    let make = move || {
        move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&namespace),
            Some(LinkNameSpaceType::Network),
        )?;
        make()
    };
    // A thread of its own: it stays in that namespace, and ends.
    std::thread::spawn(make)
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the namespace cannot be entered")))
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

    #[test]
    fn connections_that_stand_still_take_no_thread_of_the_runtime() {
        let pid = i32::try_from(std::process::id()).unwrap();
        // Only root enters a namespace.
        if inside(pid, || Ok(())).is_err() {
            return;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
            let listener = socket.listen(1).unwrap();
            let address = listener.local_addr().unwrap();
            let mut accepted = Vec::new();
            while let Ok(Ok(stream)) =
                tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await
            {
                accepted.push(stream);
            }
            let mut waiting = JoinSet::new();
            for _ in 0..4 {
                waiting.spawn(connect_inside(pid, address));
            }
            tokio::task::yield_now().await;
            let work = async {
                for _ in 0..8 {
                    tokio::task::spawn_blocking(|| ()).await.unwrap();
                }
            };
            assert!(tokio::time::timeout(Duration::from_secs(10), work).await.is_ok());
            let another = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            assert!(connect_inside(pid, another.local_addr().unwrap()).await.is_ok());
        });
    }

    fn policy(rules: serde_json::Value) -> Policy {
        serde_json::from_value(serde_json::json!({ "rules": rules })).unwrap()
    }

    #[test]
    fn the_closest_rule_wins_and_unnamed_hosts_are_refused() {
        let rules = policy(serde_json::json!([
            { "domain": "*", "action": "deny" },
            { "domain": "*.example.org", "action": "allow" },
            { "domain": "secret.example.org", "action": "deny" },
            { "domain": "Exact.net", "action": "allow" },
        ]));
        for (host, expected) in [
            ("a.example.org", true),
            ("a.b.EXAMPLE.org.", true),
            ("secret.example.org", false),
            ("example.org", false),
            ("evilexample.org", false),
            ("exact.net", true),
            ("x.exact.net", false),
            ("", false),
        ] {
            assert_eq!(rules.allows(host), expected, "{host}");
        }
        let defaults = policy(
            serde_json::json!([{ "include": "defaults" }, { "domain": "pypi.org", "action": "deny" }]),
        );
        assert!(defaults.allows("github.com") && defaults.allows("api.github.com"));
        assert!(!defaults.allows("pypi.org") && !defaults.allows("example.org"));
        assert!(Policy::default().allows("anything") && !Policy::default().is_limited());
    }

    #[test]
    fn bad_rules_are_named() {
        assert!(
            policy(serde_json::json!([{ "domain": "a b", "action": "allow" }]))
                .problem()
                .unwrap()
                .contains("a b")
        );
        assert!(
            policy(serde_json::json!([{ "include": "everything" }]))
                .problem()
                .unwrap()
                .contains("everything")
        );
        assert_eq!(
            policy(serde_json::json!([{ "domain": "*.a-b.c", "action": "allow" }])).problem(),
            None
        );
        assert!(
            serde_json::from_value::<Policy>(
                serde_json::json!({ "rules": [{ "domain": "x", "action": "maybe" }] })
            )
            .is_err()
        );
    }

    #[test]
    fn private_hosts_are_found_at_addresses_of_the_sprite() {
        let hosts = ["127.0.0.1:8779", "model:80", "10.1.2.3:443", "localhost:90", "only-a-host"]
            .map(str::to_owned);
        assert_eq!(loopback_ports(&hosts), [8779, 90]);
        let found: Vec<_> = Forward::of(&hosts)
            .into_iter()
            .map(|forward| (forward.host, forward.address.to_string()))
            .collect();
        let expected = [("model", "127.77.0.1"), ("10.1.2.3", "10.1.2.3")];
        assert_eq!(found, expected.map(|(host, address)| (host.to_owned(), address.to_owned())));
        assert!(
            loopback("[::1]").is_some()
                && loopback("LocalHost").is_some()
                && loopback("127.9.9.9").is_some()
        );
        assert!(loopback("example.org").is_none() && loopback("10.0.0.1").is_none());
    }

    #[test]
    fn requests_to_a_proxy_are_read() {
        let connect =
            parse_head(b"CONNECT api.x.org:443 HTTP/1.1\r\nHost: api.x.org\r\n\r\n").unwrap();
        assert_eq!(connect, Asked { host: "api.x.org".to_owned(), port: 443, forward: None });
        let get =
            parse_head(b"GET http://u:p@x.org:81/a?b HTTP/1.1\r\nHost: x.org\r\nProxy-Connection: keep-alive\r\nA: 1\r\n\r\n").unwrap();
        assert_eq!((get.host.as_str(), get.port), ("x.org", 81));
        let head = String::from_utf8(get.forward.unwrap()).unwrap();
        assert_eq!(head, "GET /a?b HTTP/1.1\r\nHost: x.org\r\nA: 1\r\nConnection: close\r\n\r\n");
        for bad in [
            "",
            "GET / HTTP/1.1\r\n\r\n",
            "CONNECT x HTTP/1.1\r\n\r\n",
            "CONNECT x:99999 HTTP/1.1\r\n\r\n",
            "\u{fffd}\r\n\r\n",
        ] {
            assert_eq!(parse_head(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn this_machine_and_its_networks_are_not_public() {
        for private in [
            "127.0.0.1",
            "10.1.2.3",
            "192.168.0.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "::1",
            "fd00::1",
            "fe80::1",
            "::ffff:127.0.0.1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
        assert!(
            is_public("93.184.216.34".parse().unwrap())
                && is_public("2606:2800::1".parse().unwrap())
        );
    }
}
