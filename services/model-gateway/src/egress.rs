//! Where requests to addresses that users configure may go: public ones, and private ones that the
//! operator names. The gateway stands in the services' network, which no session may reach through
//! it.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs as _},
    sync::Arc,
    time::Duration,
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, ready},
};
use moka::future::Cache;
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use tokio::sync::Semaphore;
use types::address::is_public;

/// Lookups at a time. Each takes a thread of the runtime until the system's resolver answers, which
/// may be long after its request was given up; providers' names are looked up by such threads too.
const LOOKUPS_MAX: usize = 64;
/// How long all who ask for a name share one lookup, whether it has ended or not.
const SHARED_FOR: Duration = Duration::from_secs(5);
const NAMES_MAX: u64 = 10_000;

type Lookup = Shared<BoxFuture<'static, Result<Vec<SocketAddr>, Arc<io::Error>>>>;

/// Private addresses that may be reached, as `host:port`, and what names lead to. Cheap to clone.
#[derive(Clone)]
pub struct Egress {
    private_hosts: Arc<[String]>,
    lookups: Cache<String, Lookup>,
    slots: Arc<Semaphore>,
}

impl Egress {
    pub fn new(private_hosts: Vec<String>) -> Self {
        let lookups = Cache::builder().max_capacity(NAMES_MAX).time_to_live(SHARED_FOR).build();
        Self {
            private_hosts: private_hosts.into(),
            lookups,
            slots: Arc::new(Semaphore::new(LOOKUPS_MAX)),
        }
    }

    /// What a name leads to.
    async fn look_up(&self, name: &str) -> Result<Vec<SocketAddr>, Arc<io::Error>> {
        let (slots, asked) = (self.slots.clone(), name.to_owned());
        let lookup = async move {
            // Given back by the thread: it is busy for as long as the lookup takes.
            let slot =
                slots.acquire_owned().await.map_err(|error| Arc::new(io::Error::other(error)))?;
            let found = tokio::task::spawn_blocking(move || {
                let _slot = slot;
                Ok((asked.as_str(), 0).to_socket_addrs()?.collect())
            });
            found.await.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(Arc::new)
        };
        self.lookups.get_with(name.to_ascii_lowercase(), ready(lookup.boxed().shared())).await.await
    }

    /// Whether a URL may be requested, as far as the URL itself shows. The addresses of its host
    /// are checked when it is resolved.
    pub fn allows(&self, url: &Url) -> bool {
        let Some(host) = url.host_str() else { return false };
        let named =
            url.port_or_known_default().is_some_and(|port| self.names(&format!("{host}:{port}")));
        match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            Ok(address) => named || is_public(address),
            // A name that is named with one port is resolved to private addresses for all.
            Err(_) => named || !self.names_host(host),
        }
    }

    fn names(&self, host_and_port: &str) -> bool {
        self.private_hosts.iter().any(|named| named.eq_ignore_ascii_case(host_and_port))
    }

    fn names_host(&self, host: &str) -> bool {
        self.private_hosts.iter().any(|named| {
            named.rsplit_once(':').is_some_and(|(name, _)| name.eq_ignore_ascii_case(host))
        })
    }
}

impl Resolve for Egress {
    fn resolve(&self, name: Name) -> Resolving {
        let (egress, private_allowed) = (self.clone(), self.names_host(name.as_str()));
        Box::pin(async move {
            let found = egress.look_up(name.as_str()).await?;
            let allowed: Vec<_> = found
                .into_iter()
                .filter(|address| private_allowed || is_public(address.ip()))
                .collect();
            if allowed.is_empty() {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "the host has no public address",
                )
                .into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_addresses_are_reached_where_they_are_named_and_nowhere_else() {
        let egress = Egress::new(vec!["127.0.0.1:9".to_owned(), "mcp.internal:8080".to_owned()]);
        let allows = |url: &str| egress.allows(&Url::parse(url).unwrap());
        for allowed in [
            "https://mcp.example/mcp",
            "http://127.0.0.1:9/mcp",
            "http://MCP.internal:8080/",
            "http://1.1.1.1/",
        ] {
            assert!(allows(allowed), "{allowed}");
        }
        for refused in [
            "http://127.0.0.1:8780/",
            "http://169.254.169.254/latest",
            "http://[::1]/",
            "http://[::ffff:10.0.0.1]/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://mcp.internal/",
        ] {
            assert!(!allows(refused), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_name_that_leads_to_a_private_address_is_not_resolved() {
        let resolve = |egress: Egress| async move {
            egress.resolve("localhost".parse().unwrap()).await.map(Iterator::count)
        };
        assert!(resolve(Egress::new(Vec::new())).await.is_err());
        assert!(
            resolve(Egress::new(vec!["localhost:80".to_owned()]))
                .await
                .is_ok_and(|count| count > 0)
        );
    }

    #[tokio::test]
    async fn all_who_ask_for_a_name_share_one_lookup_also_once_they_have_gone() {
        let egress = Egress::new(Vec::new());
        let held = egress.slots.clone().acquire_many_owned(LOOKUPS_MAX as u32 - 1).await.unwrap();
        let (slot, hold) =
            (egress.slots.clone().acquire_owned().await.unwrap(), Duration::from_millis(20));
        for _ in 0..3 {
            assert!(tokio::time::timeout(hold, egress.look_up("LOCALHOST")).await.is_err());
        }
        assert_eq!(egress.lookups.iter().count(), 1);
        // One slot is enough for all of them.
        drop(slot);
        let asked = futures::future::join_all((0..100).map(|_| egress.look_up("localhost"))).await;
        assert!(asked.iter().all(|found| found.as_ref().is_ok_and(|found| !found.is_empty())));
        drop(held);
        assert_eq!(egress.slots.available_permits(), LOOKUPS_MAX);
    }
}
