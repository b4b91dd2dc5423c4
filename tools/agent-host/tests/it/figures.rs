//! Figures, printed: `cargo test -p agent-host --test it figures -- --ignored --nocapture`, with
//! `AOD_AGENT_HOST` for the static build.

use std::time::{Duration, Instant};

use contract::host::record;

use crate::support::{Host, output};

fn p50(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
#[ignore = "prints figures"]
fn figures() {
    let host = Host::shell();
    host.start();
    let mut attached = host.attach(0);
    let mut turn = 0;
    let times = (0..100).map(|_| {
        turn += 1;
        let start = Instant::now();
        attached.turn(turn, "echo hi");
        start.elapsed()
    });
    println!("message to the end of `echo hi`, p50: {:?}", p50(times.collect()));

    let start = Instant::now();
    attached.message(1000, "head -c 1000000000 /dev/zero");
    let mut bytes = 0;
    loop {
        let kinds = attached
            .until(|kind| matches!(kind, record::Kind::Output(_) | record::Kind::TurnEnded(_)));
        bytes += output(&kinds).0.len();
        attached.persisted();
        if matches!(kinds.last(), Some(record::Kind::TurnEnded(_))) {
            break;
        }
    }
    println!("output: {:.0} MB/s", bytes as f64 / 1e6 / start.elapsed().as_secs_f64());

    attached.message(1001, "while read -r -t 0.05 _ </dev/zero; do date +%s%N; done; for i in $(seq 100); do date +%s%N; sleep 0.01; done");
    let mut times = Vec::new();
    loop {
        let kinds = attached
            .until(|kind| matches!(kind, record::Kind::Output(_) | record::Kind::TurnEnded(_)));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        times.extend(
            output(&kinds)
                .0
                .lines()
                .filter_map(|line| Some(now - Duration::from_nanos(line.parse().ok()?))),
        );
        if matches!(kinds.last(), Some(record::Kind::TurnEnded(_))) {
            break;
        }
    }
    println!("line to reader, p50, with the start of `date`: {:?}", p50(times));
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.pid().unwrap())).unwrap();
    println!("idle host: {}", status.lines().find(|line| line.starts_with("VmRSS")).unwrap());
}
