//! Tokens and money, as events and sessions show them.

use contract::{host::ModelUsage, session};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Tokens and money.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub input: u64,
    pub output: u64,
    pub cache_read: u64,
    pub cache_write: u64,
    pub cost_micro_usd: u64,
}

impl From<&session::Usage> for Totals {
    fn from(usage: &session::Usage) -> Self {
        Self {
            input: usage.input_tokens.unwrap_or_default(),
            output: usage.output_tokens.unwrap_or_default(),
            cache_read: usage.cache_read_tokens.unwrap_or_default(),
            cache_write: usage.cache_write_tokens.unwrap_or_default(),
            cost_micro_usd: usage.cost_micro_usd.unwrap_or_default(),
        }
    }
}

impl From<&ModelUsage> for Totals {
    fn from(usage: &ModelUsage) -> Self {
        Self {
            input: usage.input_tokens,
            output: usage.output_tokens,
            cache_read: usage.cache_read_tokens,
            cache_write: usage.cache_write_tokens,
            cost_micro_usd: 0,
        }
    }
}

impl Totals {
    pub fn plus(self, other: Self) -> Self {
        Self {
            input: self.input.saturating_add(other.input),
            output: self.output.saturating_add(other.output),
            cache_read: self.cache_read.saturating_add(other.cache_read),
            cache_write: self.cache_write.saturating_add(other.cache_write),
            cost_micro_usd: self.cost_micro_usd.saturating_add(other.cost_micro_usd),
        }
    }

    pub fn minus(self, other: Self) -> Self {
        Self {
            input: self.input.saturating_sub(other.input),
            output: self.output.saturating_sub(other.output),
            cache_read: self.cache_read.saturating_sub(other.cache_read),
            cache_write: self.cache_write.saturating_sub(other.cache_write),
            cost_micro_usd: self.cost_micro_usd.saturating_sub(other.cost_micro_usd),
        }
    }

    /// A session's `usage`.
    pub fn of_session(self) -> Value {
        let mut usage = json!({
            "input_tokens": self.input,
            "output_tokens": self.output,
            "cache_read_input_tokens": self.cache_read,
            "cache_creation": { "ephemeral_5m_input_tokens": self.cache_write, "ephemeral_1h_input_tokens": 0 },
        });
        if self.cost_micro_usd > 0 {
            // Whole cents, as text.
            let cents = self.cost_micro_usd.div_ceil(10_000).to_string();
            usage["list_cost"] = json!({ "amount": cents, "currency": "USD" });
        }
        usage
    }

    pub fn of_request(self) -> Value {
        json!({
            "input_tokens": self.input,
            "output_tokens": self.output,
            "cache_creation_input_tokens": self.cache_write,
            "cache_read_input_tokens": self.cache_read,
        })
    }
}
