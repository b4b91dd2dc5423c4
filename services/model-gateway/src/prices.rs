//! List prices of models: a table that ships with the release, and a table of the deployment that
//! overrides it.

use std::path::Path;

use anyhow::Context as _;
use serde::Deserialize;
use types::Provider;

use crate::usage::Tokens;

#[derive(Clone, Debug)]
pub struct Prices(Vec<Price>);

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(default)]
    price: Vec<Price>,
}

/// In US dollars per million tokens, which are millionths of a dollar per token.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Price {
    provider: String,
    /// The model's name without a date, or the start of several names followed by `*`.
    model: String,
    input: f64,
    output: f64,
    cache_read: Option<f64>,
    cache_write: Option<f64>,
    cache_write_hour: Option<f64>,
    above: Option<u64>,
    input_above: Option<f64>,
    output_above: Option<f64>,
    cache_read_above: Option<f64>,
    cache_write_above: Option<f64>,
    cache_write_hour_above: Option<f64>,
}

impl Price {
    fn is_of(&self, model: &str) -> bool {
        match self.model.strip_suffix('*') {
            Some(start) => model.starts_with(start),
            None => model.strip_prefix(self.model.as_str()).is_some_and(is_version),
        }
    }
}

/// Whether a model's name with this suffix is a version of the same model: none, a date as in
/// `-20251001`, `-2025-08-07` and `@20251001`, or `-latest`. Any other name may be a model with
/// another price.
fn is_version(rest: &str) -> bool {
    let date = rest.strip_prefix(['-', '@']).unwrap_or_default();
    let digits = date.bytes().filter(u8::is_ascii_digit).count();
    let is_date = digits == 8 && date.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    rest.is_empty() || rest == "-latest" || is_date
}

impl Prices {
    /// # Errors
    /// When the deployment's own table cannot be read.
    pub fn load(own: Option<&Path>) -> anyhow::Result<Self> {
        let mut prices = Vec::new();
        if let Some(path) = own {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("AOD_MODEL_PRICES: {}", path.display()))?;
            prices.extend(
                parse(&text).with_context(|| format!("AOD_MODEL_PRICES: {}", path.display()))?,
            );
        }
        prices.extend(parse(include_str!("../prices.toml")).context("the release's own prices")?);
        Ok(Self(prices))
    }

    /// Millionths of a US dollar, rounded up; none where the model has no price.
    pub fn cost(&self, provider: Provider, model: &str, tokens: Tokens) -> Option<u64> {
        let price = self
            .0
            .iter()
            .find(|price| price.provider == provider.as_str() && price.is_of(model))?;
        let whole_input =
            tokens.input.saturating_add(tokens.cache_read).saturating_add(tokens.cache_write);
        let is_above = price.above.is_some_and(|above| whole_input > above);
        let (input, output, cache_read, cache_write, cache_write_hour) = match is_above {
            true => (
                price.input_above.unwrap_or(price.input),
                price.output_above.unwrap_or(price.output),
                price.cache_read_above.or(price.cache_read),
                price.cache_write_above.or(price.cache_write),
                price.cache_write_hour_above.or(price.cache_write_hour),
            ),
            false => (
                price.input,
                price.output,
                price.cache_read,
                price.cache_write,
                price.cache_write_hour,
            ),
        };
        let cache_write = cache_write.unwrap_or(input);
        let parts = [
            (tokens.input, input),
            (tokens.cache_read, cache_read.unwrap_or(input)),
            (tokens.cache_write.saturating_sub(tokens.cache_write_hour), cache_write),
            (tokens.cache_write_hour, cache_write_hour.unwrap_or(cache_write)),
            (tokens.output, output),
        ];
        let micros: u128 = parts
            .into_iter()
            .map(|(tokens, price)| u128::from(tokens) * u128::from(millionths(price)))
            .sum();
        Some(u64::try_from(micros.div_ceil(1_000_000)).unwrap_or(u64::MAX))
    }
}

fn parse(text: &str) -> anyhow::Result<Vec<Price>> {
    let table: Table = toml::from_str(text)?;
    for price in &table.price {
        anyhow::ensure!(
            price.provider.parse::<Provider>().is_ok(),
            "unknown provider {}",
            price.provider
        );
        let numbers = [
            Some(price.input),
            Some(price.output),
            price.cache_read,
            price.cache_write,
            price.cache_write_hour,
            price.input_above,
            price.output_above,
            price.cache_read_above,
            price.cache_write_above,
            price.cache_write_hour_above,
        ];
        anyhow::ensure!(
            numbers.into_iter().flatten().all(|price| (0.0..1e6).contains(&price)),
            "{} has no valid price",
            price.model
        );
    }
    Ok(table.price)
}

fn millionths(price: f64) -> u64 {
    // Checked when it was read.
    (price * 1e6).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The models that the release's CLIs request on their own, whatever their users choose.
    #[test]
    fn models_of_the_clis_have_a_price_and_models_with_similar_names_have_none() {
        let prices = Prices::load(None).unwrap();
        let tokens = Tokens { input: 1_000_000, ..Tokens::default() };
        let cost = |provider: Provider, model: &str| prices.cost(provider, model, tokens);
        for (provider, model, input) in [
            (Provider::Anthropic, "claude-opus-4-1-20250805", 15_000_000),
            (Provider::Anthropic, "claude-opus-4-8", 5_000_000),
            (Provider::Anthropic, "claude-opus-5-5", 4_000_000),
            (Provider::Anthropic, "claude-haiku-5-5", 500_000),
            (Provider::Openai, "gpt-5-2025-08-07", 1_250_000),
            (Provider::Openai, "gpt-5.2-codex", 1_750_000),
            (Provider::Openai, "gpt-6-sol", 4_000_000),
            (Provider::Google, "gemini-3.8-flash", 750_000),
            (Provider::Google, "gemini-2.5-flash-lite", 100_000),
        ] {
            assert_eq!(cost(provider, model), Some(input), "{model}");
        }
        for (provider, model) in [
            (Provider::Anthropic, "claude-opus-4-9"),
            (Provider::Anthropic, "claude-opus-5-fast"),
            (Provider::Openai, "gpt-5.2-max"),
            (Provider::Openai, "gpt-55"),
            (Provider::Google, "gemini-2.5-flash-image"),
        ] {
            assert_eq!(cost(provider, model), None, "{model}");
        }
    }

    #[test]
    fn costs_follow_the_list_and_its_tiers_and_own_prices_come_first() {
        let prices = Prices::load(None).unwrap();
        let tokens = Tokens { input: 1_000_000, output: 100_000, ..Tokens::default() };
        assert_eq!(
            prices.cost(Provider::Anthropic, "claude-haiku-4-5-20251001", tokens),
            Some(1_500_000)
        );
        assert_eq!(
            prices.cost(Provider::Google, "gemini-2.5-pro", tokens),
            Some(4_000_000),
            "above 200,000 tokens"
        );
        let cached = Tokens { input: 1, cache_read: 10, cache_write: 10, ..Tokens::default() };
        assert_eq!(
            prices.cost(Provider::Anthropic, "claude-sonnet-4-5", cached),
            Some(44),
            "43.5, rounded up"
        );
        let for_an_hour = Tokens { cache_write_hour: 4, ..cached };
        assert_eq!(
            prices.cost(Provider::Anthropic, "claude-sonnet-4-5", for_an_hour),
            Some(53),
            "52.5, rounded up"
        );
        assert_eq!(prices.cost(Provider::Anthropic, "some-new-model", tokens), None);
        assert_eq!(prices.cost(Provider::Openai, "claude-sonnet-4-5", tokens), None);
        let own = std::env::temp_dir().join(format!("prices-{}.toml", std::process::id()));
        std::fs::write(
            &own,
            "[[price]]\nprovider = \"anthropic\"\nmodel = \"*\"\ninput = 1\noutput = 2\n",
        )
        .unwrap();
        assert_eq!(
            Prices::load(Some(&own)).unwrap().cost(Provider::Anthropic, "some-new-model", tokens),
            Some(1_200_000)
        );
        std::fs::write(
            &own,
            "[[price]]\nprovider = \"nobody\"\nmodel = \"*\"\ninput = 1\noutput = 2\n",
        )
        .unwrap();
        assert!(Prices::load(Some(&own)).is_err());
        std::fs::remove_file(own).unwrap();
    }
}
