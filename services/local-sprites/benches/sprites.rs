//! How fast Sprites are made and used, beside plain bubblewrap in the same run: `cargo bench -p
//! local-sprites`, as root.
//!
//! Machines differ and are noisy: read the ratios.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use sprites::{Client, ExecEvent, ExecRequest, Sprite};
use testkit::bench::{Figure, Measured, Times};

const TOKEN: &str = "t";
const STREAM_BYTES: usize = 1 << 30;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run())
}

async fn run() -> anyhow::Result<()> {
    let data = tempfile::tempdir()?;
    let port = testkit::free_port()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_local-sprites"));
    command
        .env("LOCAL_SPRITES_ADDR", format!("127.0.0.1:{port}"))
        .env("LOCAL_SPRITES_TOKEN", TOKEN)
        .env("LOCAL_SPRITES_DATA_DIR", data.path())
        .env("LOCAL_SPRITES_ROOTFS", testkit::rootfs())
        .env("AOD_ADMIN_ADDR", "127.0.0.1:0")
        .env("RUST_LOG", "error");
    let mut server = testkit::spawn_tied(&command)?;
    let client = Client::new(
        sprites::http_client()?,
        &format!("http://127.0.0.1:{port}"),
        TOKEN.to_owned().into(),
    );
    testkit::eventually("the server answers", async || client.list("").await.is_ok()).await;
    let measured = measure(&client).await;
    // What runs in its Sprites ends with it.
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&server),
        rustix::process::Signal::INT,
    )?;
    server.wait()?;
    measured
}

async fn measure(client: &Client) -> anyhow::Result<()> {
    let sandbox = Times::of(50, async || {
        bubblewrap(&["true"]).output()?;
        Ok(())
    })
    .await?;
    let mut number = 0;
    let create = Times::of(50, async || {
        number += 1;
        Ok(client.ensure(&format!("made-{number}").parse()?).await?)
    });
    Figure::new("local-sprites: a Sprite is made", &create.await?)
        .beside("bwrap true", &sandbox)
        .report()?;

    let sprite = client.sprite("made-1".parse()?);
    let exec = Times::of(200, async || run_true(&sprite).await).await?;
    Figure::new("local-sprites: exec of `true`, a connection for each", &exec)
        .beside("bwrap true", &sandbox)
        .report()?;

    let begun = Instant::now();
    for number in 51..=100 {
        client.ensure(&format!("made-{number}").parse()?).await?;
    }
    let each = |begun: Instant, count: f64| {
        Measured::amount(begun.elapsed().as_secs_f64() * 1e3 / count, "ms")
    };
    Figure::new("local-sprites: Sprites 51 to 100 are made, each", each(begun, 50.0)).report()?;
    let full = Times::of(200, async || run_true(&sprite).await).await?;
    Figure::new("local-sprites: exec of `true`, 100 Sprites there", &full)
        .beside("bwrap true", &sandbox)
        .report()?;
    let begun = Instant::now();
    let all = (1..=100).map(|number| {
        let client = client.clone();
        async move { run_true(&client.sprite(format!("made-{number}").parse()?)).await }
    });
    futures::future::try_join_all(all).await?;
    Figure::new("local-sprites: exec in each of 100 Sprites at once, in all", each(begun, 1.0))
        .report()?;

    let begun = Instant::now();
    let through_pipe = bubblewrap(&["head", "-c", &STREAM_BYTES.to_string(), "/dev/zero"])
        .stdout(Stdio::piped())
        .spawn()?;
    let read = tokio::task::spawn_blocking(move || drain(through_pipe)).await??;
    anyhow::ensure!(read == STREAM_BYTES, "the pipe lost {}", STREAM_BYTES - read);
    let floor = rate(begun.elapsed());
    let begun = Instant::now();
    let bytes = STREAM_BYTES.to_string();
    let request =
        ExecRequest { argv: &["head", "-c", &bytes, "/dev/zero"], ..ExecRequest::default() };
    let (mut exec, mut received) = (sprite.exec(&request).await?, 0);
    while let ExecEvent::Stdout(data) = exec.next().await? {
        received += data.len();
    }
    anyhow::ensure!(received == STREAM_BYTES, "exec lost {}", STREAM_BYTES - received);
    let ours = rate(begun.elapsed());
    let stdout = Figure::new("local-sprites: stdout of exec", Measured::rate(ours, "MB"));
    stdout.beside("through bwrap and a pipe", Measured::rate(floor, "MB")).report()?;

    let begun = Instant::now();
    for number in 1..=100 {
        client.delete(&format!("made-{number}").parse()?).await?;
    }
    Figure::new("local-sprites: a Sprite is deleted", each(begun, 100.0)).report()
}

fn bubblewrap(argv: &[&str]) -> Command {
    let mut command = Command::new("bwrap");
    command.args([
        "--unshare-user",
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--ro-bind",
        "/",
        "/",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
    ]);
    command.args(argv).stdin(Stdio::null());
    command
}

fn drain(mut child: std::process::Child) -> anyhow::Result<usize> {
    use std::io::Read as _;
    let (mut pipe, mut buffer, mut read) =
        (child.stdout.take().ok_or_else(|| anyhow::anyhow!("no pipe"))?, vec![0; 64 * 1024], 0);
    loop {
        match pipe.read(&mut buffer)? {
            0 => break,
            bytes => read += bytes,
        }
    }
    child.wait()?;
    Ok(read)
}

async fn run_true(sprite: &Sprite) -> anyhow::Result<()> {
    let request = ExecRequest { argv: &["true"], ..ExecRequest::default() };
    let finished = sprite.exec(&request).await?.finish().await?;
    anyhow::ensure!(finished.code == 0, "{finished:?}");
    Ok(())
}

fn rate(time: Duration) -> f64 {
    STREAM_BYTES as f64 / 1e6 / time.as_secs_f64()
}
