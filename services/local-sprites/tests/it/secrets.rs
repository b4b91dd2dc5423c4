//! Secrets whose values stay outside of a Sprite: real programs in it send placeholders, and the
//! hosts of the secrets receive the values.

use std::collections::BTreeMap;

use rustix::process::Signal;
use sprites::{Error, OutsideSecret, Sprite};
use testkit::{
    https::{Https, KEPT},
    tls::Tls,
};

use crate::server::{Server, as_root, said};

const PLACEHOLDER: &str = "aod_placeholder_of_a_test";
const VALUE: &str = "SENTINEL-value";

fn secret(value: &str, host: &str) -> OutsideSecret {
    OutsideSecret {
        placeholder: PLACEHOLDER.to_owned(),
        value: value.into(),
        hosts: vec![host.to_owned()],
    }
}

/// A sandbox server that trusts the authority of a test's own hosts, which Sprites may reach.
struct World {
    server: Server,
    listed: Https,
    other: Https,
    _tls: Tls,
}

impl World {
    async fn start() -> Self {
        let tls = Tls::generate().unwrap();
        let (listed, other) =
            (Https::start(&tls).await.unwrap(), Https::start(&tls).await.unwrap());
        let hosts = format!("127.0.0.1:{},127.0.0.1:{}", listed.port, other.port);
        let server = Server::start(&[
            ("LOCAL_SPRITES_PRIVATE_HOSTS", &hosts),
            ("LOCAL_SPRITES_CA_FILE", tls.ca_file().to_str().unwrap()),
        ])
        .await;
        Self { server, listed, other, _tls: tls }
    }

    async fn put(&self, sprite: &Sprite) -> BTreeMap<String, String> {
        let host = format!("127.0.0.1:{}", self.listed.port);
        sprite.set_secrets(&[secret(VALUE, &host)]).await.unwrap()
    }

    fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.listed.port)
    }
}

/// What a script writes that has the variables of the server's answer.
async fn said_with(sprite: &Sprite, variables: &BTreeMap<String, String>, script: &str) -> String {
    let exports: String =
        variables.iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
    said(sprite, &(exports + script)).await
}

#[tokio::test]
async fn a_host_receives_the_value_that_its_sandbox_does_not_know() {
    let world = World::start().await;
    let url = world.url();
    let (free, limited) = (world.server.sprite("free").await, world.server.sprite("limited").await);
    limited.limit_network(&["127.0.0.1".to_owned()]).await.unwrap();
    for sprite in [&free, &limited] {
        let variables = world.put(sprite).await;
        let clients = [
            format!("curl -sS -H 'Authorization: Bearer {PLACEHOLDER}' {url}/curl"),
            format!("curl -sS -u user:{PLACEHOLDER} {url}/basic"),
            format!(
                "python3 -c 'import urllib.request as r; print(r.urlopen(r.Request(\"{url}/python\", headers={{\"X-Key\": \"{PLACEHOLDER}\"}})).read().decode())'"
            ),
        ];
        let said = said_with(sprite, &variables, &clients.join("; ")).await;
        assert!(said.contains(&format!("authorization: Bearer {VALUE}")), "{said}");
        assert!(said.contains("authorization: Basic dXNlcjpTRU5USU5FTC12YWx1ZQ=="), "{said}");
        assert!(said.contains(&format!("x-key: {VALUE}")), "{said}");
        // Bodies and addresses stay as they are, and are streamed.
        let body = format!(
            "curl -sS --data-binary {PLACEHOLDER} '{url}/body?{PLACEHOLDER}'; head -c 50M /dev/zero | curl -sS -T - {url}/large | wc -c"
        );
        assert_eq!(said_with(sprite, &variables, &body).await, format!("{PLACEHOLDER}52428800\n"));
    }
    let heads = world.listed.heads();
    assert!(heads.iter().any(|head| head.starts_with(&format!("POST /body?{PLACEHOLDER}"))));
    assert_eq!(heads.len(), 10, "{heads:?}");
}

#[tokio::test]
async fn a_connection_outlives_those_that_its_host_closes() {
    let world = World::start().await;
    let sprite = world.server.sprite("one").await;
    let variables = world.put(&sprite).await;
    let script = format!(
        "python3 - <<'E'
import http.client, ssl, time
connection = http.client.HTTPSConnection('127.0.0.1', 3128, context=ssl.create_default_context())
connection.set_tunnel('127.0.0.1', {})
for pause in (0, 0, {}):
    time.sleep(pause)
    connection.request('GET', '/', headers={{'X-Key': '{PLACEHOLDER}'}})
    answer = connection.getresponse()
    print(answer.status, b'{VALUE}' in answer.read(), connection.sock is not None)
E",
        world.listed.port,
        2 * KEPT.as_secs()
    );
    let said = said_with(&sprite, &variables, &script).await;
    assert_eq!(said, "200 True True\n".repeat(3));
}

#[tokio::test]
async fn a_host_that_is_not_listed_receives_the_placeholder_and_is_not_intercepted() {
    let world = World::start().await;
    let sprite = world.server.sprite("one").await;
    let variables = world.put(&sprite).await;
    let other = format!("https://127.0.0.1:{}/", world.other.port);
    let send = format!("curl -sS -H 'X-Key: {PLACEHOLDER}' {other}");
    // It shows its own certificate, which no one in the Sprite trusts.
    let said = said_with(&sprite, &variables, &send).await;
    assert!(said.contains("certificate") && world.other.heads().is_empty(), "{said}");
    let said = said_with(&sprite, &variables, &format!("{send} -k")).await;
    assert!(said.contains(&format!("x-key: {PLACEHOLDER}")), "{said}");
    // Another host by the address of the listed one, as a server of many hosts would take it.
    let fronted =
        format!("curl -sS -H 'X-Key: {PLACEHOLDER}' -H 'Host: evil.example' {}", world.url());
    let said = said_with(&sprite, &variables, &fronted).await;
    assert!(said.contains("another host"), "{said}");
    // By another way than the proxy.
    let around = format!("curl -skS --noproxy '*' -H 'X-Key: {PLACEHOLDER}' {}", world.url());
    let said = said_with(&sprite, &variables, &around).await;
    assert!(said.contains(&format!("x-key: {PLACEHOLDER}")), "{said}");
    let heads = [world.listed.heads(), world.other.heads()].concat();
    assert!(heads.len() == 2 && !heads.concat().contains(VALUE), "{heads:?}");
}

#[tokio::test]
async fn a_host_that_does_not_prove_who_it_is_receives_nothing() {
    let world = World::start().await;
    let impostor = Https::start(&Tls::generate().unwrap()).await.unwrap();
    let port = format!("127.0.0.1:{}", impostor.port);
    let server = Server::start(&[("LOCAL_SPRITES_PRIVATE_HOSTS", &port)]).await;
    let sprite = server.sprite("one").await;
    let variables = sprite.set_secrets(&[secret(VALUE, &port)]).await.unwrap();
    let send = format!("curl -sS -k -H 'X-Key: {PLACEHOLDER}' https://{port}/");
    let said = said_with(&sprite, &variables, &format!("{send} -v")).await;
    assert!(said.contains("502") && impostor.heads().is_empty(), "{said}");
    drop(world);
}

#[tokio::test]
async fn nothing_of_a_value_is_in_the_sprite_or_on_the_servers_disk() {
    let mut world = World::start().await;
    let sprite = world.server.sprite("one").await;
    let variables = world.put(&sprite).await;
    let search = "sudo grep -rl SENTINEL-[v]alue / --exclude-dir=proc --exclude-dir=sys 2>/dev/null; sudo cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep -c SENTINEL-[v]alue; sudo ls -A /.sprite/policy";
    let found = said_with(&sprite, &variables, &as_root(search)).await;
    assert!(found.starts_with("0\n") && found.contains("ca-bundle.pem"), "{found}");
    let grep = std::process::Command::new("grep")
        .args(["-rl", VALUE])
        .arg(world.server.data.path())
        .output()
        .unwrap();
    assert!(grep.stdout.is_empty(), "{}", String::from_utf8_lossy(&grep.stdout));
    // Another server knows the authority, which programs trust, and no value until it is sent.
    world.server.end(Signal::TERM).await;
    world.server.run().await;
    let send = format!("curl -sS -H 'X-Key: {PLACEHOLDER}' {}", world.url());
    let said_before = said_with(&sprite, &variables, &send).await;
    assert!(!said_before.contains(VALUE), "{said_before}");
    assert_eq!(world.put(&sprite).await, variables);
    let said_after = said_with(&sprite, &variables, &send).await;
    assert!(said_after.contains(&format!("x-key: {VALUE}")), "{said_after}");
    // Taken back, it is sent no more.
    assert!(sprite.set_secrets(&[]).await.unwrap().is_empty());
    let said_last = said_with(&sprite, &variables, &format!("{send} -k")).await;
    assert!(said_last.contains(&format!("x-key: {PLACEHOLDER}")), "{said_last}");
    assert!(said(&sprite, "ls -l /.sprite/policy/ca.pem").await.contains("ca.pem"));
}

#[tokio::test]
async fn wrong_secrets_are_refused_without_their_values() {
    let server = Server::start(&[]).await;
    let sprite = server.sprite("one").await;
    for value in ["SENTINEL\r\nInjected: x", ""] {
        let refused = sprite.set_secrets(&[secret(value, "a.example")]).await.unwrap_err();
        assert!(matches!(refused, Error::Rejected { .. }), "{refused:?}");
        assert!(!refused.to_string().contains("SENTINEL"), "{refused}");
    }
}
