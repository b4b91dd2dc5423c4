//! Where requests to addresses that users configure may go: public ones, and private ones that the operator names. The gateway stands in
//! the services' network, which no session may reach through it.

use std::{io, net::IpAddr, sync::Arc};

use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use types::address::is_public;

/// Private addresses that may be reached, as `host:port`. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Egress {
    private_hosts: Arc<[String]>,
}

impl Egress {
    pub fn new(private_hosts: Vec<String>) -> Self {
        Self { private_hosts: private_hosts.into() }
    }

    /// Whether a URL may be asked for, as far as it tells itself. What its name leads to is checked when it is resolved.
    pub fn allows(&self, url: &Url) -> bool {
        let Some(host) = url.host_str() else { return false };
        let named = url.port_or_known_default().is_some_and(|port| self.names(&format!("{host}:{port}")));
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
        self.private_hosts.iter().any(|named| named.rsplit_once(':').is_some_and(|(name, _)| name.eq_ignore_ascii_case(host)))
    }
}

impl Resolve for Egress {
    fn resolve(&self, name: Name) -> Resolving {
        let private_allowed = self.names_host(name.as_str());
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<_> = found.filter(|address| private_allowed || is_public(address.ip())).collect();
            if allowed.is_empty() {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the host has no public address").into());
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
        for allowed in ["https://mcp.example/mcp", "http://127.0.0.1:9/mcp", "http://MCP.internal:8080/", "http://1.1.1.1/"] {
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
        let resolve = |egress: Egress| async move { egress.resolve("localhost".parse().unwrap()).await.map(Iterator::count) };
        assert!(resolve(Egress::new(Vec::new())).await.is_err());
        assert!(resolve(Egress::new(vec!["localhost:80".to_owned()])).await.is_ok_and(|count| count > 0));
    }
}
