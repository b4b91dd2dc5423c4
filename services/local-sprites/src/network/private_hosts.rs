//! The private addresses that the deployment lets Sprites reach, and a Sprite's own loopback.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};

use crate::network::{CONNECT_MAX, CONNECTIONS_MAX, namespace::inside};

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

/// The ports of this machine's loopback among the deployment's own hosts.
pub fn loopback_ports(private_hosts: &[String]) -> Vec<u16> {
    let port = |host: &String| {
        let (name, port) = host.rsplit_once(':')?;
        matches!(name, "127.0.0.1" | "localhost").then(|| port.parse().ok()).flatten()
    };
    private_hosts.iter().filter_map(port).collect()
}

/// A Sprite's loopback is its own: what a program means by it, where all that it asks for goes
/// through the proxy.
pub fn loopback(host: &str) -> Option<IpAddr> {
    let host = host.trim_matches(['[', ']']);
    if host.eq_ignore_ascii_case("localhost") {
        return Some(Ipv4Addr::LOCALHOST.into());
    }
    host.parse::<IpAddr>().ok().filter(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
