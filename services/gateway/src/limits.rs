//! Rate limits: failed authentications by address, requests by key.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{extract::ConnectInfo, http::request::Parts};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter, clock::Clock as _};
use moka::sync::Cache;
use tokio_util::sync::CancellationToken;
use types::KeyHash;

/// Failures are counted over this time from the first.
const FAILURES_COUNTED: Duration = Duration::from_secs(60);
const ADDRESSES_MAX: u64 = 100_000;
const TIDY_INTERVAL: Duration = Duration::from_secs(60);
/// The number of proxies that append to this header is configured; earlier entries come from the
/// client and are not trusted.
const FORWARDED_FOR: &str = "x-forwarded-for";

#[derive(Debug)]
pub struct Settings {
    /// Failed authentications from one address within a minute; none: no limit.
    pub failures_per_minute: Option<NonZeroU32>,
    /// Requests of one key per second, on each gateway; none: no limit.
    pub requests_per_second: Option<NonZeroU32>,
    /// Proxies in front of the gateway that append the address of their client to
    /// `X-Forwarded-For`.
    pub trusted_proxies: usize,
}

/// Refused for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TryLater {
    pub seconds: u32,
}

#[derive(Clone)]
pub struct RateLimits(Arc<Shared>);

struct Shared {
    failures_max: Option<NonZeroU32>,
    failures: Cache<IpAddr, Arc<AtomicU32>>,
    requests: Option<DefaultKeyedRateLimiter<KeyHash>>,
    trusted_proxies: usize,
}

impl RateLimits {
    pub fn new(settings: &Settings) -> Self {
        Self(Arc::new(Shared {
            failures_max: settings.failures_per_minute,
            failures: Cache::builder()
                .max_capacity(ADDRESSES_MAX)
                .time_to_live(FAILURES_COUNTED)
                .build(),
            // A burst of two seconds' worth.
            requests: settings.requests_per_second.map(|rate| {
                RateLimiter::keyed(
                    Quota::per_second(rate)
                        .allow_burst(rate.saturating_mul(NonZeroU32::MIN.saturating_add(1))),
                )
            }),
            trusted_proxies: settings.trusted_proxies,
        }))
    }

    /// Who asks: the address that failures are counted by. Of IPv6 the network, for its holder has
    /// all of its addresses.
    pub fn client(&self, parts: &Parts) -> IpAddr {
        let peer = parts
            .extensions
            .get::<ConnectInfo<SocketAddr>>()
            .map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |peer| peer.0.ip());
        let forwarded = self.0.trusted_proxies.checked_sub(1).and_then(|behind| {
            let lists =
                parts.headers.get_all(FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok());
            let mut hops: Vec<&str> =
                lists.flat_map(|list| list.split(',')).map(str::trim).collect();
            hops.reverse();
            hops.get(behind)?.parse().ok()
        });
        network(forwarded.unwrap_or(peer))
    }

    /// Counts a failed authentication. A valid key is never refused: it cannot be guessed, and
    /// others may share the address.
    ///
    /// # Errors
    /// [`TryLater`] where the address failed too often.
    pub fn note_failure(&self, client: IpAddr) -> Result<(), TryLater> {
        metrics::counter!("aod_auth_failures_total").increment(1);
        let Some(max) = self.0.failures_max else { return Ok(()) };
        let before = self.0.failures.get_with(client, Arc::default).fetch_add(1, Ordering::Relaxed);
        if before < max.get() {
            Ok(())
        } else {
            Err(TryLater { seconds: FAILURES_COUNTED.as_secs() as u32 })
        }
    }

    /// Counts a request of a key that works.
    pub fn check_rate(&self, key: KeyHash) -> Result<(), TryLater> {
        let Some(requests) = &self.0.requests else { return Ok(()) };
        requests.check_key(&key).map_err(|refused| {
            let wait = refused.wait_time_from(requests.clock().now());
            TryLater {
                seconds: u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1),
            }
        })
    }

    /// Forgets keys that have not asked lately.
    pub async fn tidy(self, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(TIDY_INTERVAL)).await.is_some() {
            if let Some(requests) = &self.0.requests {
                requests.retain_recent();
                requests.shrink_to_fit();
            }
        }
    }
}

fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn limits(trusted_proxies: usize) -> RateLimits {
        let number = NonZeroU32::new(3);
        RateLimits::new(&Settings {
            failures_per_minute: number,
            requests_per_second: number,
            trusted_proxies,
        })
    }

    fn client(limits: &RateLimits, peer: &str, forwarded: &[&str]) -> String {
        let mut request = Request::new(());
        request.extensions_mut().insert(ConnectInfo(SocketAddr::new(peer.parse().unwrap(), 1)));
        for value in forwarded {
            request.headers_mut().append(FORWARDED_FOR, value.parse().unwrap());
        }
        limits.client(&request.into_parts().0).to_string()
    }

    #[test]
    fn a_client_cannot_choose_the_address_that_is_limited() {
        assert_eq!(client(&limits(0), "10.0.0.1", &["1.2.3.4"]), "10.0.0.1");
        assert_eq!(client(&limits(1), "10.0.0.1", &["6.6.6.6, 1.2.3.4"]), "1.2.3.4");
        assert_eq!(client(&limits(2), "10.0.0.1", &["6.6.6.6", "1.2.3.4, 10.0.0.2"]), "1.2.3.4");
        assert_eq!(client(&limits(2), "10.0.0.1", &["1.2.3.4"]), "10.0.0.1");
        assert_eq!(client(&limits(1), "10.0.0.1", &["nonsense"]), "10.0.0.1");
        assert_eq!(client(&limits(0), "2001:db8:1:2:3:4:5:6", &[]), "2001:db8:1:2::");
        assert_eq!(client(&limits(0), "::ffff:10.0.0.1", &[]), "10.0.0.1");
    }

    #[test]
    fn only_an_address_that_fails_too_often_is_limited() {
        let limits = limits(0);
        let (bad, good): (IpAddr, IpAddr) =
            ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        for _ in 0..3 {
            limits.note_failure(bad).unwrap();
        }
        assert_eq!(limits.note_failure(bad), Err(TryLater { seconds: 60 }));
        limits.note_failure(good).unwrap();
    }

    #[test]
    fn a_key_has_its_burst_and_then_its_rate() {
        let limits = limits(0);
        let (one, other) =
            (types::ApiKey::generate().unwrap().hash(), types::ApiKey::generate().unwrap().hash());
        for _ in 0..6 {
            limits.check_rate(one).unwrap();
        }
        assert_eq!(limits.check_rate(one), Err(TryLater { seconds: 1 }));
        limits.check_rate(other).unwrap();
    }
}
