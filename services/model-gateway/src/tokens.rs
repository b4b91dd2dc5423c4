//! Sessions' tokens, and the credentials that they stand for: redeemed at the vault, kept in memory
//! for a short time.

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use bus::Bus;
use contract::{
    auth::CheckUserRequest,
    rpc,
    vault::{Bundle, RedeemModelTokenRequest, Route, RouteKind},
};
use moka::future::Cache;
use prost::Message as _;
use sealing::KeyPair;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use types::{CredentialKind, ErrorCode, Provider};
use zeroize::Zeroize as _;

use crate::{
    call::{Scheme, Shown},
    routed::GrantedRoute,
    share::{Share, Shares},
};

const DEADLINE: Duration = Duration::from_secs(10);
/// How long a redemption is used before the vault is asked again: a revoked token, a disabled
/// user, or a key that was replaced, is noticed within it.
const FRESH: Duration = Duration::from_secs(60);
/// How long a redemption is used while the vault does not answer.
const KEPT: Duration = Duration::from_secs(600);
/// How soon after it was renewed a token may be renewed again before [`FRESH`] is over.
const RENEWED_AFTER: Duration = Duration::from_secs(1);
/// How long it is taken to be known whether a user is active.
const USER_FRESH: Duration = Duration::from_secs(1);
/// An unknown token is refused without asking the vault again.
const REFUSED_FOR: Duration = Duration::from_secs(5);
const TOKENS_MAX: u64 = 20_000;

type Hash = [u8; 32];

/// What a token stands for. Wiped when dropped.
pub struct Grant {
    pub session_id: String,
    secrets: BTreeMap<&'static str, SecretString>,
    routes: Vec<Arc<GrantedRoute>>,
    pub share: Arc<Share>,
}

impl fmt::Debug for Grant {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Grant")
            .field("session_id", &self.session_id)
            .finish_non_exhaustive()
    }
}

/// The header that a provider reads a credential from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Credential<'a> {
    ApiKey(&'static str, &'a str),
    Bearer(&'a str),
}

impl fmt::Debug for Credential<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::ApiKey(..) => "ApiKey(..)",
            Self::Bearer(_) => "Bearer(..)",
        })
    }
}

impl Credential<'_> {
    /// Under which kind the user stored it.
    pub fn kind(&self, provider: Provider) -> &'static str {
        match (self, provider) {
            (Self::Bearer(_), Provider::Anthropic) => CredentialKind::ClaudeOauth.as_str(),
            _ => CredentialKind::Provider(provider).as_str(),
        }
    }
}

impl Grant {
    /// The route with a path.
    pub fn route(&self, kind: RouteKind, path: &str) -> Option<Arc<GrantedRoute>> {
        self.routes.iter().find(|route| route.kind == kind && route.path == path).cloned()
    }

    /// What a request is sent on with: of a Claude subscription where the client shows its token
    /// that way, else the API key.
    pub fn credential(&self, provider: Provider, scheme: Scheme) -> Option<Credential<'_>> {
        let of = |kind: CredentialKind| {
            self.secrets.get(kind.as_str()).map(|secret| secret.expose_secret())
        };
        let key = of(CredentialKind::Provider(provider));
        match provider {
            Provider::Anthropic => {
                let (key, oauth) = (
                    key.map(|key| Credential::ApiKey("x-api-key", key)),
                    of(CredentialKind::ClaudeOauth).map(Credential::Bearer),
                );
                if scheme == Scheme::Bearer { oauth.or(key) } else { key.or(oauth) }
            }
            Provider::Openai => key.map(Credential::Bearer),
            Provider::Google => key.map(|key| Credential::ApiKey("x-goog-api-key", key)),
        }
    }
}

/// Why a token cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenRefused {
    Unknown,
    Unavailable,
}

#[derive(Clone)]
struct Entry {
    grant: Arc<Grant>,
    /// When the vault was asked.
    asked: Instant,
    /// Whether that was before [`FRESH`] was over.
    is_renewed: bool,
}

/// Redeemed tokens. Cheap to clone; concurrent requests with one token ask once.
#[derive(Clone)]
pub struct Tokens {
    bus: Bus,
    gateway: Arc<str>,
    shares: Shares,
    entries: Cache<Hash, Entry>,
    refused: Cache<Hash, ()>,
    asking: Cache<Hash, Result<Entry, TokenRefused>>,
    are_active: Cache<String, bool>,
}

impl Tokens {
    pub fn new(bus: Bus, gateway: Arc<str>, shares: Shares) -> Self {
        Self {
            bus,
            gateway,
            shares,
            entries: Cache::builder().max_capacity(TOKENS_MAX).time_to_live(KEPT).build(),
            refused: Cache::builder().max_capacity(TOKENS_MAX).time_to_live(REFUSED_FOR).build(),
            // Those who ask at the same time share one answer, which is not used later.
            asking: Cache::builder()
                .max_capacity(TOKENS_MAX)
                .time_to_live(Duration::from_millis(1))
                .build(),
            are_active: Cache::builder().max_capacity(TOKENS_MAX).time_to_live(USER_FRESH).build(),
        }
    }

    pub async fn redeem(&self, shown: &Shown) -> Result<Arc<Grant>, TokenRefused> {
        let hash: Hash = Sha256::digest(shown.token.as_bytes()).into();
        let known = self.entries.get(&hash).await;
        if let Some(entry) = known.as_ref().filter(|entry| entry.asked.elapsed() < FRESH) {
            return Ok(entry.grant.clone());
        }
        if self.refused.contains_key(&hash) {
            return Err(TokenRefused::Unknown);
        }
        let asked = self.asking.get_with(hash, async { self.ask(hash).await }).await;
        match (asked, known) {
            (Ok(entry), _) => {
                self.entries.insert(hash, entry.clone()).await;
                Ok(entry.grant)
            }
            (Err(TokenRefused::Unavailable), Some(known)) => Ok(known.grant),
            (Err(refused), _) => {
                self.forget(hash, refused).await;
                Err(refused)
            }
        }
    }

    /// Redeems a token again before its time, once per second at most: for a route that is not
    /// known, or a secret that its server refuses. None: it cannot be redeemed.
    pub async fn renew(&self, shown: &Shown) -> Option<Arc<Grant>> {
        let hash: Hash = Sha256::digest(shown.token.as_bytes()).into();
        // The first time is at once: agents' CLIs do not wait for servers that begin slowly.
        if let Some(known) = self.entries.get(&hash).await.filter(|known| known.is_renewed) {
            tokio::time::sleep(RENEWED_AFTER.saturating_sub(known.asked.elapsed())).await;
            let newer = self.entries.get(&hash).await.filter(|entry| entry.asked > known.asked);
            if let Some(newer) = newer {
                return Some(newer.grant);
            }
        }
        self.ask_again(hash).await
    }

    /// Redeems a token again at once: what it stands for was just changed. None: it cannot be
    /// redeemed.
    pub async fn renew_changed(&self, shown: &Shown) -> Option<Arc<Grant>> {
        self.ask_again(Sha256::digest(shown.token.as_bytes()).into()).await
    }

    async fn ask_again(&self, hash: Hash) -> Option<Arc<Grant>> {
        let begun = Instant::now();
        loop {
            let asked = self.asking.get_with(hash, async { self.ask(hash).await }).await;
            match asked {
                // What another request asked before may be out of date.
                Ok(entry) if entry.asked < begun => self.asking.invalidate(&hash).await,
                Ok(mut entry) => {
                    entry.is_renewed = true;
                    self.entries.insert(hash, entry.clone()).await;
                    return Some(entry.grant);
                }
                Err(refused) => {
                    self.forget(hash, refused).await;
                    return None;
                }
            }
        }
    }

    /// Forgets a token that the vault no longer knows.
    async fn forget(&self, hash: Hash, refused: TokenRefused) {
        if refused == TokenRefused::Unknown {
            self.entries.invalidate(&hash).await;
            self.refused.insert(hash, ()).await;
        }
    }

    /// Returns once the vault refuses a token, which is asked each minute.
    pub async fn revoked(&self, shown: &Shown) {
        loop {
            tokio::time::sleep(FRESH).await;
            if matches!(self.redeem(shown).await, Err(TokenRefused::Unknown)) {
                return;
            }
        }
    }

    async fn ask(&self, hash: Hash) -> Result<Entry, TokenRefused> {
        let redeemed = self.redeem_at_vault(hash).await;
        let outcome = match &redeemed {
            Ok(_) => "granted",
            Err(TokenRefused::Unknown) => "refused",
            Err(TokenRefused::Unavailable) => "failed",
        };
        metrics::counter!("aod_model_token_redemptions_total", "outcome" => outcome).increment(1);
        redeemed
    }

    async fn is_active(&self, user_id: String) -> Result<bool, TokenRefused> {
        let user = CheckUserRequest { user_id };
        let reply = self.bus.call::<rpc::CheckUser>(&user, DEADLINE).await.map_err(|error| {
            tracing::warn!(%error, "failed to check whether a session's user is active");
            TokenRefused::Unavailable
        })?;
        Ok(reply.is_active)
    }

    async fn redeem_at_vault(&self, hash: Hash) -> Result<Entry, TokenRefused> {
        let asked = Instant::now();
        let key = KeyPair::generate().map_err(|_| TokenRefused::Unavailable)?;
        let request = RedeemModelTokenRequest {
            token_hash: hash.to_vec(),
            public_key: key.public().to_vec(),
            gateway: self.gateway.to_string(),
        };
        let reply =
            self.bus.call::<rpc::RedeemModelToken>(&request, DEADLINE).await.map_err(|error| {
                match error.code {
                    ErrorCode::NotFound => TokenRefused::Unknown,
                    _ => {
                        tracing::warn!(%error, "failed to redeem a session's token");
                        TokenRefused::Unavailable
                    }
                }
            })?;
        // The vault does not know who is disabled.
        let user = reply.user_id.clone();
        let is_active = self.are_active.try_get_with(user.clone(), self.is_active(user)).await;
        if !is_active.map_err(|refused| *refused)? {
            return Err(TokenRefused::Unknown);
        }
        let unreadable = |error: &dyn fmt::Display| {
            tracing::error!(%error, "the vault's answer cannot be opened");
            TokenRefused::Unavailable
        };
        let plaintext = key.open(&reply.sealed, &hash).map_err(|error| unreadable(&error))?;
        let bundle = Bundle::decode(plaintext.as_slice()).map_err(|error| unreadable(&error))?;
        let mut secrets = BTreeMap::new();
        for mut secret in bundle.secrets {
            if let (Ok(kind), Ok(text)) =
                (secret.kind.parse::<CredentialKind>(), std::str::from_utf8(&secret.value))
            {
                secrets.insert(kind.as_str(), SecretString::from(text.trim()));
            }
            secret.value.zeroize();
        }
        let routes = bundle.routes.into_iter().map(|route| Arc::new(granted(route))).collect();
        let share = self.shares.of(&reply.session_id, &reply.user_id);
        let grant = Grant { session_id: reply.session_id, secrets, routes, share };
        Ok(Entry { grant: Arc::new(grant), asked, is_renewed: false })
    }
}

fn granted(route: Route) -> GrantedRoute {
    let kind = route.kind();
    let headers = route
        .headers
        .into_iter()
        .map(|header| (header.name, SecretString::from(header.value)))
        .collect();
    GrantedRoute {
        kind,
        path: route.path,
        url: route.url,
        is_refused: route.is_refused,
        headers,
        refreshable: route.refreshable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share::{Pools, ShareLimits};

    const ONE: Pools = Pools { body_units: 1, routed_units: 1, connections: 1 };

    fn grant(kinds: &[CredentialKind]) -> Grant {
        let secrets =
            kinds.iter().map(|kind| (kind.as_str(), SecretString::from(kind.as_str()))).collect();
        Grant {
            session_id: String::new(),
            secrets,
            routes: Vec::new(),
            share: Shares::new(ShareLimits { requests: 1, session: ONE, user: ONE }).of("s", "u"),
        }
    }

    #[test]
    fn a_claude_subscription_is_used_where_the_client_shows_its_token_that_way() {
        let anthropic = CredentialKind::Provider(Provider::Anthropic);
        let both = grant(&[anthropic, CredentialKind::ClaudeOauth]);
        let (key, oauth) = (
            Credential::ApiKey("x-api-key", "provider:anthropic"),
            Credential::Bearer("runtime_token:claude-oauth"),
        );
        assert_eq!(both.credential(Provider::Anthropic, Scheme::ApiKey), Some(key));
        assert_eq!(both.credential(Provider::Anthropic, Scheme::Bearer), Some(oauth));
        let only_key = grant(&[anthropic]);
        assert_eq!(only_key.credential(Provider::Anthropic, Scheme::Bearer), Some(key));
        assert_eq!(
            grant(&[CredentialKind::ClaudeOauth]).credential(Provider::Anthropic, Scheme::ApiKey),
            Some(oauth)
        );
        assert_eq!(only_key.credential(Provider::Openai, Scheme::Bearer), None);
    }
}
