//! Memory and descriptors of each service over time, as SVG.

use std::fmt::Write as _;

use super::usage::{Process, Sample};

const ROW: f64 = 90.0;
const HEAD: f64 = 60.0;
const PANEL: f64 = 400.0;
const LEFT: [f64; 2] = [150.0, 620.0];
const WIDTH: f64 = 1060.0;
const COLOURS: [&str; 6] = ["#1b6ac9", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0f766e"];

/// Draws one row for each service, memory on the left and descriptors on the right. Each process is
/// a line, each fault a grey one.
pub(super) fn svg(processes: &[Process], faults: &[(f64, &str)], seconds: f64) -> String {
    let mut services: Vec<&str> =
        processes.iter().map(|process| process.service.as_str()).collect();
    services.sort_unstable();
    services.dedup();
    let height = HEAD + ROW * services.len() as f64 + 30.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"{}\" y=\"24\" font-size=\"14\">resident memory</text><text x=\"{}\" y=\"24\" font-size=\"14\">descriptors</text>\n\
         <text x=\"{}\" y=\"42\" fill=\"#666\">one line for each process; grey: a fault</text>\n",
        LEFT[0], LEFT[1], LEFT[0]
    );
    for (row, service) in services.iter().enumerate() {
        let top = HEAD + ROW * row as f64;
        let of_service: Vec<&Process> =
            processes.iter().filter(|process| process.service == *service).collect();
        let _ = writeln!(
            svg,
            "<text x=\"10\" y=\"{:.0}\" font-size=\"13\">{service}</text>",
            top + ROW / 2.0
        );
        let memory = |sample: &Sample| sample.memory_bytes as f64 / (1024.0 * 1024.0);
        panel(&mut svg, &of_service, (LEFT[0], top), faults, seconds, (&memory, " MB"));
        panel(
            &mut svg,
            &of_service,
            (LEFT[1], top),
            faults,
            seconds,
            (&|sample| sample.descriptors as f64, ""),
        );
    }
    let bottom = HEAD + ROW * services.len() as f64 + 12.0;
    let (unit, length) = if seconds < 7200.0 { ("min", 60.0) } else { ("h", 3600.0) };
    for left in LEFT {
        for quarter in 0..=4 {
            let at = seconds * f64::from(quarter) / 4.0;
            let x = left + PANEL * f64::from(quarter) / 4.0;
            let _ = writeln!(
                svg,
                "<text x=\"{x:.0}\" y=\"{bottom:.0}\" text-anchor=\"middle\">{:.1} {unit}</text>",
                at / length
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

type Value<'a> = (&'a dyn Fn(&Sample) -> f64, &'a str);

fn panel(
    svg: &mut String,
    processes: &[&Process],
    corner: (f64, f64),
    faults: &[(f64, &str)],
    seconds: f64,
    (value, unit): Value<'_>,
) {
    let ((left, top), height) = (corner, ROW - 20.0);
    let max = processes.iter().flat_map(|process| &process.samples).map(value).fold(1.0, f64::max);
    let x = |at: f64| left + PANEL * (at / seconds.max(1.0)).min(1.0);
    let y = |of: f64| top + height * (1.0 - of / max);
    for (at, name) in faults {
        let x = x(*at);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.0}\" y2=\"{:.0}\" stroke=\"#ddd\"><title>{name}</title></line>",
            top + height
        );
    }
    let _ = writeln!(
        svg,
        "<rect x=\"{left}\" y=\"{top:.0}\" width=\"{PANEL}\" height=\"{height}\" fill=\"none\" stroke=\"#bbb\"/>"
    );
    for (of, text) in [(max, format!("{max:.0}{unit}")), (0.0, "0".to_owned())] {
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\" fill=\"#666\">{text}</text>",
            left - 4.0,
            y(of) + 4.0
        );
    }
    for (number, process) in processes.iter().enumerate() {
        let points: Vec<String> = process
            .samples
            .iter()
            .map(|sample| format!("{:.1},{:.1}", x(sample.at), y(value(sample))))
            .collect();
        let colour = COLOURS[number % COLOURS.len()];
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.2\"/>",
            points.join(" ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_is_a_line_in_both_panels_and_each_fault_too() {
        let process = |service: &str, begun: u32| {
            let samples = (0..3).map(|number| Sample {
                at: f64::from(begun + number * 10),
                memory_bytes: 50 << 20,
                descriptors: 30,
            });
            Process::new(service, begun, samples.collect())
        };
        let processes = [process("gateway", 0), process("gateway", 40), process("scheduler", 0)];
        let svg = svg(&processes, &[(35.0, "gateway killed")], 60.0);
        assert_eq!(
            (svg.matches("<polyline").count(), svg.matches("<line").count()),
            (6, 4),
            "{svg}"
        );
        assert!(svg.contains("50 MB") && svg.contains("<title>gateway killed</title>"), "{svg}");
        let tags = |sign: &str| svg.matches(sign).count();
        assert_eq!(tags("<"), tags(">"), "{svg}");
    }
}
