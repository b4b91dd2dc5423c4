//! Pages of `/v1`: `?limit=` and `?page=`, an opaque cursor that carries the order it belongs to.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use contract::scheduler::Cursor;
use prost::Message as _;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use crate::{
    error::ApiError,
    v1::query::{Query, bad},
};

/// The order of a list by the time of creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Ascending,
    Descending,
}

/// Where a page begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    pub order: Order,
    /// The page before this row, not after it.
    pub backwards: bool,
    pub row: Cursor,
}

const PREFIX: &str = "page_";

impl Start {
    pub fn encode(&self) -> String {
        let mut bytes =
            vec![u8::from(self.order == Order::Descending) << 1 | u8::from(self.backwards)];
        // A vector grows: this cannot fail.
        let _ = self.row.encode(&mut bytes);
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    pub fn decode(text: &str) -> Option<Self> {
        let bytes = URL_SAFE_NO_PAD.decode(text.strip_prefix(PREFIX)?).ok()?;
        let (flags, row) = bytes.split_first()?;
        let order = match flags >> 1 {
            0 => Order::Ascending,
            1 => Order::Descending,
            _ => return None,
        };
        Some(Self { order, backwards: flags & 1 == 1, row: Cursor::decode(row).ok()? })
    }
}

/// Which page of a list is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub limit: u32,
    pub order: Order,
    pub start: Option<Start>,
}

/// The limits of a list: how many rows a page holds by default, and at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub default: u32,
    pub max: u32,
}

/// Those of most lists.
pub const LIMITS: Limits = Limits { default: 20, max: 100 };

impl Wanted {
    /// # Errors
    /// 400 for a bad limit, an unknown cursor, or one of another order.
    pub fn read(query: &Query, limits: Limits, default: Order) -> Result<Self, ApiError> {
        let limit = query.number("limit", limits.max)?.unwrap_or(limits.default);
        let asked = match query.one("order") {
            None => None,
            Some("asc") => Some(Order::Ascending),
            Some("desc") => Some(Order::Descending),
            Some(_) => return Err(bad("order: must be 'asc' or 'desc'")),
        };
        let start = query
            .one("page")
            .map(|text| Start::decode(text).ok_or_else(|| bad("page: unknown cursor")))
            .transpose()?;
        let order = asked.or(start.as_ref().map(|start| start.order)).unwrap_or(default);
        if start.as_ref().is_some_and(|start| start.order != order) {
            return Err(bad("page: the cursor belongs to another order"));
        }
        Ok(Self { limit, order, start })
    }

    /// For lists of one order, which is not named.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn of_fixed_order(query: &Query, limits: Limits) -> Result<Self, ApiError> {
        let wanted = Self::read(query, limits, Order::Descending)?;
        let fits = wanted.order == Order::Descending
            && wanted.start.as_ref().is_none_or(|start| !start.backwards);
        if fits { Ok(wanted) } else { Err(bad("page: unknown cursor")) }
    }

    pub fn after(&self) -> Option<Cursor> {
        self.start.as_ref().map(|start| start.row.clone())
    }
}

/// A page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page<T> {
    pub data: Vec<T>,
    /// Where the next page begins; null on the last.
    pub next_page: Option<String>,
}

/// Shows a page's rows; the next page begins after the last one.
pub fn page<R, T>(
    rows: Vec<R>,
    has_more: bool,
    cursor: impl Fn(&R) -> Cursor,
    show: impl Fn(R) -> T,
) -> axum::Json<Page<T>> {
    let next =
        |row: &R| Start { order: Order::Descending, backwards: false, row: cursor(row) }.encode();
    let next_page = rows.last().filter(|_| has_more).map(next);
    axum::Json(Page { data: rows.into_iter().map(show).collect(), next_page })
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct PageParams {
    /// How many items at most
    #[param(minimum = 1, maximum = 100)]
    limit: Option<u32>,
    /// Where the page begins: the `next_page` of the page before
    page: Option<String>,
}

/// Those of lists whose pages may be long.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes a query")]
pub struct LongPageParams {
    /// How many items at most
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// Where the page begins: the `next_page` of the page before
    page: Option<String>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_cursor_survives_its_text(position: i64, id: String, descending: bool, backwards: bool) {
            let order = if descending { Order::Descending } else { Order::Ascending };
            let start = Start { order, backwards, row: Cursor { position, id } };
            prop_assert_eq!(Start::decode(&start.encode()), Some(start));
        }

        #[test]
        fn garbage_is_no_panic(text: String) {
            let _ = Start::decode(&text);
            let _ = Start::decode(&format!("{PREFIX}{text}"));
        }
    }
}
