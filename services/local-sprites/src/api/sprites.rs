//! Creates, lists, changes and deletes Sprites (docs/sprites-api.md §2).

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use types::{SpriteName, Timestamp};

use super::{Api, ErrorResponse, Query, images, inside, invalid, lines};
use crate::sprites::{
    registry::Registry,
    sprite::{Settings, Sprite, Status},
};

const ORGANIZATION: &str = "local";
const LABELS_MAX: usize = 100;
/// Interval of heartbeats to a client that watches the list.
const HEARTBEAT: Duration = Duration::from_secs(15);

#[derive(Deserialize)]
struct Change {
    name: Option<String>,
    labels: Option<Vec<String>>,
    #[serde(default)]
    clear_labels: bool,
    environment: Option<std::collections::BTreeMap<String, String>>,
    url_settings: Option<UrlSettings>,
    runtime: Option<String>,
    /// An addition of this server (docs/sprites-api.md §8.5).
    from_image: Option<String>,
}

#[derive(Deserialize)]
struct UrlSettings {
    auth: Option<String>,
}

impl Change {
    fn parse(body: &Bytes) -> Result<Self, ErrorResponse> {
        let change: Self = serde_json::from_slice(body)
            .map_err(|error| invalid(format!("invalid JSON: {error}")))?;
        if !matches!(change.runtime.as_deref(), None | Some("default" | "dev")) {
            return Err(invalid("runtime is default or dev"));
        }
        if change.labels.as_ref().is_some_and(|labels| labels.len() > LABELS_MAX) {
            return Err(invalid("too many labels"));
        }
        if let Some(auth) =
            change.url_settings.as_ref().and_then(|settings| settings.auth.as_deref())
            && !["sprite", "public"].contains(&auth)
        {
            return Err(invalid("url_settings.auth is sprite or public"));
        }
        let bad_name = |name: &String| name.is_empty() || name.contains(['=', '\0']);
        if change.environment.as_ref().is_some_and(|environment| environment.keys().any(bad_name)) {
            return Err(invalid("environment has a name that no variable can have"));
        }
        Ok(change)
    }

    fn apply(self, settings: &mut Settings) {
        if let Some(labels) = self.labels {
            settings.labels = labels;
        }
        if self.clear_labels {
            settings.labels.clear();
        }
        if let Some(environment) = self.environment {
            settings.environment = environment;
        }
        if let Some(url_settings) = self.url_settings {
            settings.url_auth = url_settings.auth;
        }
    }
}

fn describe(sprite: &Sprite) -> Value {
    let record = sprite.record();
    let time = |micros| Timestamp::from_unix_micros(micros).to_string();
    json!({
        "id": format!("sprite-{}", record.id),
        "name": record.name,
        "organization": ORGANIZATION,
        "url": format!("http://{}.localhost", record.name),
        "url_settings": { "auth": record.settings.url_auth.as_deref().unwrap_or("sprite") },
        "status": sprite.status().name(),
        "created_at": time(record.created_at_us),
        "updated_at": time(record.updated_at_us),
        "labels": record.settings.labels,
        "from_image": record.from_image,
    })
}

pub async fn create(State(api): State<Api>, body: Bytes) -> Result<Response, ErrorResponse> {
    let mut change = Change::parse(&body)?;
    let name = change.name.take().ok_or_else(|| invalid("name is required"))?;
    let name: SpriteName = name.parse().map_err(|_| invalid("name is not a DNS label"))?;
    let image = change.from_image.take().map(|key| images::key(&key)).transpose()?;
    if let Some((wait, body)) = api.faults.refuse_creation() {
        return Err((
            StatusCode::TOO_MANY_REQUESTS,
            [(header::RETRY_AFTER, wait.to_string())],
            Json(body),
        )
            .into_response()
            .into());
    }
    api.faults.before_creation().await;
    let mut settings = Settings::default();
    change.apply(&mut settings);
    let sprite = api.registry.create(name, settings, image).await?;
    inside::open(&api, &sprite);
    Ok((StatusCode::CREATED, Json(describe(&sprite))).into_response())
}

pub async fn list(State(api): State<Api>, query: Query, headers: HeaderMap) -> Response {
    let prefix = query.get("prefix").unwrap_or_default();
    let wants_lines = |accept: &header::HeaderValue| {
        accept.to_str().is_ok_and(|accept| accept.contains("application/x-ndjson"))
    };
    if headers.get(header::ACCEPT).is_some_and(wants_lines) {
        return watch(&api, prefix.to_owned());
    }
    let limit = query
        .get("max_results")
        .and_then(|text| text.parse().ok())
        .unwrap_or(500_usize)
        .clamp(1, 500);
    let (sprites, has_more) =
        api.registry.list(prefix, query.get("continuation_token").unwrap_or_default(), limit);
    let token = has_more.then(|| sprites.last().map(|sprite| sprite.name())).flatten();
    let organization = organization(&api.registry);
    let mut reply = json!({
        "sprites": sprites.iter().map(|sprite| describe(sprite)).collect::<Vec<_>>(),
        "has_more": has_more,
        "next_continuation_token": token,
        // Some clients look for the counts here, some there (docs/sprites-api.md §2.4).
        "org": organization,
    });
    if let (Some(reply), Value::Object(counts)) = (reply.as_object_mut(), organization) {
        reply.extend(counts);
    }
    Json(reply).into_response()
}

fn organization(registry: &Registry) -> Value {
    let statuses: Vec<_> = registry.all().iter().map(|sprite| sprite.status()).collect();
    let count = |wanted: Status| statuses.iter().filter(|status| **status == wanted).count();
    json!({ "name": ORGANIZATION, "running": count(Status::Running), "warm": count(Status::Warm), "cold": count(Status::Cold) })
}

/// Each Sprite once, and again when its status changes.
fn watch(api: &Api, prefix: String) -> Response {
    let (sender, receiver) = mpsc::channel(64);
    let (registry, stop) = (api.registry.clone(), api.registry.lifecycle.stop_token());
    let told = async move {
        let (mut known, mut quiet): (HashMap<String, Status>, _) = (HashMap::new(), Duration::ZERO);
        loop {
            let sprites: Vec<Arc<Sprite>> = registry
                .all()
                .into_iter()
                .filter(|sprite| sprite.name().starts_with(&prefix))
                .collect();
            let organization = organization(&registry);
            let now: HashMap<_, _> =
                sprites.iter().map(|sprite| (sprite.name(), sprite.status())).collect();
            let gone: Vec<_> = known
                .keys()
                .filter(|name| !now.contains_key(*name))
                .map(|name| (name.clone(), "deleted"))
                .collect();
            let changed = now.iter().filter(|(name, status)| known.get(*name) != Some(status));
            let changes: Vec<_> =
                changed.map(|(name, status)| (name.clone(), status.name())).chain(gone).collect();
            quiet = if changes.is_empty() { quiet + CHECK } else { Duration::ZERO };
            for (name, status) in changes {
                let line = json!({ "name": name, "status": status, "timestamp": Timestamp::now().to_string(), "org": organization });
                if sender.send(line).await.is_err() {
                    return;
                }
            }
            if quiet >= HEARTBEAT {
                quiet = Duration::ZERO;
                let line = json!({ "type": "heartbeat", "timestamp": Timestamp::now().to_string(), "org": organization });
                if sender.send(line).await.is_err() {
                    return;
                }
            }
            known = now;
            tokio::select! {
                () = sender.closed() => return,
                () = tokio::time::sleep(CHECK) => {}
            }
        }
    };
    api.registry.lifecycle.tracker().spawn(async move { stop.run_until_cancelled(told).await });
    lines(receiver)
}

/// How often the list is looked at for a client that watches it.
const CHECK: Duration = Duration::from_millis(500);

pub async fn get(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ErrorResponse> {
    Ok(Json(describe(&*api.registry.get(&name)?)))
}

pub async fn update(
    State(api): State<Api>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Json<Value>, ErrorResponse> {
    let sprite = api.registry.get(&name)?;
    let change = Change::parse(&body)?;
    sprite.change(|record| change.apply(&mut record.settings))?;
    Ok(Json(describe(&sprite)))
}

pub async fn delete(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<StatusCode, ErrorResponse> {
    api.registry.delete(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// There is nothing newer than what runs.
pub async fn upgrade(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<StatusCode, ErrorResponse> {
    api.registry.get(&name)?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn restart(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ErrorResponse> {
    let holder = api.registry.restart(&name).await?;
    Ok(Json(
        json!({ "sprite_name": name, "machine_id": holder.process.pid.to_string(), "message": "Sprite restarted" }),
    ))
}

/// Whether a Sprite works, found out by waking it.
pub async fn check(
    State(api): State<Api>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ErrorResponse> {
    let sprite = api.registry.get(&name)?;
    let begun = std::time::Instant::now();
    let woken = api.registry.wake(&sprite).await;
    let (status, reason) = match &woken {
        Ok(_) => ("ok", None),
        Err(error) => ("failed", Some(error.to_string())),
    };
    Ok(Json(json!({
        "sprite_name": name,
        "sprite_id": format!("sprite-{}", sprite.record().id),
        "status": status,
        "reason": reason,
        "checked_at": Timestamp::now().to_string(),
        "elapsed": begun.elapsed().as_millis(),
    })))
}
