//! Makes the table of the runs of `make bench`: printed, as JSON beside the figures, and with
//! `--write` in docs/benchmarks.md.

use std::{env, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use testkit::bench::{Figure, Runs, span};

const BEGIN: &str = "<!-- begin: make bench -->\n";
const END: &str = "<!-- end: make bench -->\n";

fn main() -> Result<()> {
    let mut args = env::args().skip(1);
    let (Some(figures), write) = (args.next(), args.next()) else {
        bail!("usage: bench-table FIGURES [--write]")
    };
    let text = fs::read_to_string(&figures).with_context(|| figures.clone())?;
    let figures_path = Path::new(&figures);
    let figures = text.lines().map(serde_json::from_str).collect::<Result<Vec<Figure>, _>>()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let commit =
        command("git", &["-C", &root.display().to_string(), "describe", "--always", "--dirty"])?;
    let date = command("date", &["-u", "+%Y-%m-%d"])?;
    let machine = machine()?;

    let rows: Vec<_> = figures
        .iter()
        .map(|figure| {
            let mut row = serde_json::to_value(figure)?;
            row["ratio"] = figure.ratio().into();
            Ok(row)
        })
        .collect::<Result<_>>()?;
    let whole = json!({ "machine": machine, "commit": commit, "date": date, "figures": rows });
    fs::write(figures_path.with_extension("json"), serde_json::to_string_pretty(&whole)? + "\n")?;

    let table = table(&figures);
    println!("{machine}; commit {commit}; {date}\n\n{table}");
    if write.as_deref() == Some("--write") {
        let path = root.join("docs/benchmarks.md");
        let document = fs::read_to_string(&path)?;
        let (before, rest) =
            document.split_once(BEGIN).context("docs/benchmarks.md has no place for the table")?;
        let (_, after) =
            rest.split_once(END).context("docs/benchmarks.md has no end of the table")?;
        fs::write(
            &path,
            format!("{before}{BEGIN}Commit {commit}, {date}, {machine}.\n\n{table}{END}{after}"),
        )?;
    }
    Ok(())
}

/// In Markdown, with a line for each figure, in the order of the first run.
fn table(figures: &[Figure]) -> String {
    let mut lines: Vec<Vec<&Figure>> = Vec::new();
    for figure in figures {
        match lines.iter_mut().find(|line| line[0].what == figure.what) {
            Some(line) => line.push(figure),
            None => lines.push(vec![figure]),
        }
    }
    let mut table =
        "| what | measured | beside it, in the same run | ratio |\n| --- | --- | --- | --- |\n"
            .to_owned();
    for line in lines {
        let measured = Runs(line.iter().map(|figure| &figure.measured).collect());
        let floors: Vec<_> = line.iter().filter_map(|figure| figure.floor.as_ref()).collect();
        let floor = floors.first().map(|first| {
            format!("{}: {}", first.what, Runs(floors.iter().map(|f| &f.measured).collect()))
        });
        let ratio =
            span(line.iter().filter_map(|figure| figure.ratio()), |ratio| format!("{ratio:.2}"));
        let (what, floor) = (&line[0].what, floor.unwrap_or_default());
        table.push_str(&format!("| {what} | {measured} | {floor} | {ratio} |\n"));
    }
    table
}

fn machine() -> Result<String> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let model = model.trim_start_matches([' ', '\t', ':']);
    let memory = fs::read_to_string("/proc/meminfo")?;
    let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    let kib: u64 = memory.trim().trim_end_matches(" kB").parse()?;
    let load = fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or_default();
    let cores = std::thread::available_parallelism()?;
    Ok(format!("{cores} cores ({model}), {} GiB of memory, load {load} at the end", kib >> 20))
}

fn command(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output().with_context(|| program.to_owned())?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
