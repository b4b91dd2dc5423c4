//! Limits of a budget as arguments: of client commands and of `aod admin budget`.

use clap::Args;
use contract::scheduler::{BudgetChange, LimitChange};
use serde_json::{Map, Value};

/// The columns of usage.
pub const USAGE: crate::output::Table = crate::output::Table(&[
    "group",
    "requests",
    "unknown",
    "unpriced",
    "input_tokens",
    "output_tokens",
    "cost_usd",
]);

#[derive(Clone, Debug, Args)]
pub struct LimitArgs {
    /// Limit in US dollars at list prices, or `default`
    #[arg(long, value_parser = usd)]
    usd: Option<Limit>,
    /// Limit of input and output tokens, or `default`
    #[arg(long, value_parser = count)]
    tokens: Option<Limit>,
    /// Limit of model requests, or `default`
    #[arg(long, value_parser = count)]
    requests: Option<Limit>,
    /// Limit of seconds that turns run, or `default`
    #[arg(long, value_parser = count)]
    seconds: Option<Limit>,
}

/// A limit, of money in millionths; none: the deployment's default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(Option<u64>);

fn usd(text: &str) -> Result<Limit, &'static str> {
    if text == "default" {
        return Ok(Limit(None));
    }
    let usd = text.parse::<f64>().ok().filter(|usd| (0.0..1e9).contains(usd));
    usd.map(|usd| Limit(Some((usd * 1e6).round() as u64)))
        .ok_or("a number of US dollars, or `default`")
}

pub fn count(text: &str) -> Result<Limit, &'static str> {
    if text == "default" {
        return Ok(Limit(None));
    }
    let count = text.parse::<u64>().ok().filter(|count| i64::try_from(*count).is_ok());
    count.map(|count| Limit(Some(count))).ok_or("a number from 0, or `default`")
}

impl Limit {
    pub const fn change(self) -> LimitChange {
        LimitChange { max: self.0 }
    }
}

impl LimitArgs {
    pub const fn is_empty(&self) -> bool {
        self.usd.is_none()
            && self.tokens.is_none()
            && self.requests.is_none()
            && self.seconds.is_none()
    }

    /// For the bus.
    pub fn change(&self) -> BudgetChange {
        BudgetChange {
            cost_micro_usd: self.usd.map(Limit::change),
            tokens: self.tokens.map(Limit::change),
            requests: self.requests.map(Limit::change),
            seconds: self.seconds.map(Limit::change),
            ..BudgetChange::default()
        }
    }

    /// For the API; null where nothing was given.
    pub fn body(&self) -> Value {
        let micro =
            self.usd.map(|Limit(usd)| usd.map_or(Value::Null, |micro| (micro as f64 / 1e6).into()));
        let whole =
            |limit: Option<Limit>| limit.map(|Limit(max)| max.map_or(Value::Null, Value::from));
        let parts = [
            ("usd", micro),
            ("tokens", whole(self.tokens)),
            ("requests", whole(self.requests)),
            ("seconds", whole(self.seconds)),
        ];
        let body: Map<String, Value> =
            parts.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
        if body.is_empty() { Value::Null } else { body.into() }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        limits: LimitArgs,
    }

    #[test]
    fn limits_are_sent_as_they_were_given() {
        let limits = |args: &[&str]| {
            Command::try_parse_from([&["x"], args].concat()).map(|command| command.limits).ok()
        };
        let given = limits(&["--usd", "2.5", "--tokens", "default"]).unwrap();
        assert_eq!(given.body(), json!({ "usd": 2.5, "tokens": null }));
        assert_eq!(given.change().cost_micro_usd, Some(LimitChange { max: Some(2_500_000) }));
        assert_eq!(
            (given.change().tokens, given.change().requests),
            (Some(LimitChange { max: None }), None)
        );
        assert!(limits(&[]).unwrap().is_empty() && limits(&[]).unwrap().body().is_null());
        assert!(limits(&["--usd", "-1"]).is_none() && limits(&["--tokens", "1.5"]).is_none());
    }
}
