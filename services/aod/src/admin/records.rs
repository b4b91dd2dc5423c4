//! `aod admin dead-letters` and `aod admin audit`.

use bus::dead_letters::DeadLetter;
use contract::{
    rpc,
    vault::{ListRedemptionsRequest, Redemption},
};
use serde_json::{Value, json};
use types::limits::PAGE_MAX;

use crate::{
    admin::operator::{AdminError, Operator, time},
    output::Table,
};

impl Operator {
    pub(super) async fn dead_letters(&self, limit: usize) -> Result<(), AdminError> {
        const LETTERS: Table = Table(&["dead_lettered_at", "subject", "reason"]);
        let letters = self.bus.dead_letters(limit).await?;
        let describe = |letter: &DeadLetter| {
            json!({
                "dead_lettered_at": letter.dead_lettered_at.to_string(),
                "subject": letter.subject,
                "reason": letter.reason,
            })
        };
        self.output.list(&letters.iter().map(describe).collect::<Vec<_>>(), LETTERS);
        Ok(())
    }

    pub(super) async fn audit(
        &self,
        session_id: Option<String>,
        limit: u32,
    ) -> Result<(), AdminError> {
        const REDEMPTIONS: Table =
            Table(&["redeemed_at", "session", "purpose", "runner", "outcome", "kinds"]);
        let (mut redemptions, mut before) = (Vec::new(), None);
        while redemptions.len() < limit as usize {
            let page = (limit - u32::try_from(redemptions.len()).unwrap_or(limit)).min(PAGE_MAX);
            let request =
                ListRedemptionsRequest { session_id: session_id.clone(), limit: page, before };
            let reply = self.call::<rpc::ListRedemptions>(&request).await?.redemptions;
            before = reply.last().map(|redemption| redemption.redemption_id);
            redemptions.extend(reply.iter().map(describe_redemption));
            if reply.len() < page as usize {
                break;
            }
        }
        self.output.list(&redemptions, REDEMPTIONS);
        Ok(())
    }
}

fn describe_redemption(redemption: &Redemption) -> Value {
    json!({
        "redeemed_at": time(redemption.redeemed_at_us),
        "session": redemption.session_id,
        "purpose": redemption.purpose,
        "runner": redemption.runner,
        "outcome": redemption.outcome,
        "kinds": redemption.kinds.join(","),
        "lease": redemption.lease_id,
    })
}
