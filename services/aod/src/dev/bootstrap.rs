//! The first user: with a key, a Sprites credential for the local server, and with the scripted
//! model something to call it with.

use std::time::Duration;

use bus::{Bus, vault::AcceptedKeys};
use contract::{
    auth::{CreateKeyRequest, EnsureUserRequest, VerifyKeyRequest},
    rpc,
    vault::PutCredentialRequest,
};
use types::{ApiKey, CredentialKind, Provider};

use crate::dev::data::Secrets;

const DEADLINE: Duration = Duration::from_secs(10);
const USER: &str = "dev";
/// Keys for a model that looks at none.
const SCRIPTED_MODEL_KEY: &str = "scripted-model-needs-no-key";

/// Idempotent: it runs at every start.
pub async fn user(
    config: &bus::Config,
    secrets: &Secrets,
    own_sprites: bool,
    scripted_model: bool,
) -> anyhow::Result<()> {
    let bus = Bus::connect(config).await?;
    let user =
        bus.call::<rpc::EnsureUser>(&EnsureUserRequest { name: USER.to_owned() }, DEADLINE).await?;
    let key = ApiKey::parse(&secrets.api_key)?;
    let hash = key.hash().as_bytes().to_vec();
    if bus
        .call::<rpc::VerifyKey>(&VerifyKeyRequest { key_hash: hash.clone() }, DEADLINE)
        .await
        .is_err()
    {
        let request = CreateKeyRequest {
            user_id: user.user_id.clone(),
            name: "aod dev".to_owned(),
            key_hash: hash,
            prefix: key.display_prefix(),
            expires_at_us: None,
            ..CreateKeyRequest::default()
        };
        bus.call::<rpc::CreateKey>(&request, DEADLINE).await?;
    }
    let mut credentials = Vec::new();
    if own_sprites {
        credentials.push((CredentialKind::Sprites, secrets.sprites_token.as_str()));
    }
    if scripted_model {
        credentials.extend(
            Provider::ALL.map(|provider| (CredentialKind::Provider(provider), SCRIPTED_MODEL_KEY)),
        );
    }
    for (kind, value) in credentials {
        let sealed = bus
            .seal_for_vault(
                &AcceptedKeys::default(),
                &user.user_id,
                kind.as_str(),
                value.as_bytes(),
                DEADLINE,
            )
            .await?;
        let request = PutCredentialRequest {
            user_id: user.user_id.clone(),
            kind: kind.as_str().to_owned(),
            sealed: Some(sealed),
            ..PutCredentialRequest::default()
        };
        bus.call::<rpc::PutCredential>(&request, DEADLINE).await?;
    }
    Ok(())
}
