//! Pages of lists. A page is limited by rows and by bytes, which Postgres adds up, so that no reply
//! is larger than a message and no more is read than is sent.

use bus::RpcError;
use contract::scheduler::{Cursor, ListRequest};
use sqlx::{AssertSqlSafe, FromRow, PgPool, Postgres, Row as _, postgres::PgRow, query::Query};
use time::OffsetDateTime;
use types::{ErrorCode, UserId};
use uuid::Uuid;

/// A page ends with the row that reaches this many bytes, and no row is larger than that: together
/// they fit a message.
const BYTES_MAX: u32 = (types::limits::MESSAGE_BYTES_MAX / 2) as u32 - 64 * 1024;

/// Refuses a row that would not fit into a page.
///
/// # Errors
/// When it is larger than a page may be.
pub fn check_size(what: &str, bytes: usize) -> Result<(), RpcError> {
    if bytes <= BYTES_MAX as usize {
        return Ok(());
    }
    Err(RpcError::new(
        ErrorCode::Unprocessable,
        format!("The {what} is too large: its fields may hold {BYTES_MAX} bytes together"),
    ))
}

/// Where a page begins, and how many rows it may hold.
pub struct PageStart {
    pub time: OffsetDateTime,
    pub id: Uuid,
    pub number: i32,
    pub limit: i64,
}

impl PageStart {
    /// Rows older than the cursor, or all.
    pub fn by_time(limit: u32, after: Option<&Cursor>) -> Result<Self, RpcError> {
        let malformed = || RpcError::invalid("Invalid cursor");
        let (time, id) = match after {
            None => (OffsetDateTime::now_utc() + time::Duration::days(1), Uuid::max()),
            Some(cursor) => (
                OffsetDateTime::from_unix_timestamp_nanos(i128::from(cursor.position) * 1000)
                    .map_err(|_| malformed())?,
                cursor.id.parse().map_err(|_| malformed())?,
            ),
        };
        Ok(Self { time, id, ..Self::by_number_upwards(limit, None) })
    }

    /// Parts with a smaller number than the cursor's, or all.
    pub fn by_number_downwards(limit: u32, after: Option<&Cursor>) -> Self {
        Self { number: after.map_or(i32::MAX, number), ..Self::by_number_upwards(limit, None) }
    }

    /// Parts with a greater number than the cursor's, or all.
    pub fn by_number_upwards(limit: u32, after: Option<&Cursor>) -> Self {
        let limit = limit.clamp(1, types::limits::PAGE_MAX).into();
        Self {
            time: OffsetDateTime::UNIX_EPOCH,
            id: Uuid::nil(),
            number: after.map_or(0, number),
            limit,
        }
    }
}

fn number(cursor: &Cursor) -> i32 {
    i32::try_from(cursor.position).unwrap_or(if cursor.position < 0 { 0 } else { i32::MAX })
}

/// Filters that lists of agents, environments and sessions share.
pub struct Filters {
    include_archived: bool,
    pub from: Option<OffsetDateTime>,
    pub before: Option<OffsetDateTime>,
}

impl Filters {
    /// # Errors
    /// When a time is not valid.
    pub fn of(request: &ListRequest) -> Result<Self, RpcError> {
        let time = |us: i64| {
            OffsetDateTime::from_unix_timestamp_nanos(i128::from(us) * 1000)
                .map_err(|_| RpcError::invalid("Invalid time"))
        };
        let (from, before) = (
            request.created_from_us.map(time).transpose()?,
            request.created_before_us.map(time).transpose()?,
        );
        Ok(Self { include_archived: request.include_archived, from, before })
    }

    /// As a condition of SQL; `from` and `before` are bound to the parameters `first` and the next.
    /// A filter that is not asked for is not in the statement: a plan that is kept would have to
    /// suit it.
    pub fn conditions(&self, not_archived: &str, first: usize) -> String {
        let (second, archived) =
            (first + 1, if self.include_archived { "true" } else { not_archived });
        let from = if self.from.is_some() {
            format!("created_at >= ${first}")
        } else {
            format!("${first}::timestamptz is null")
        };
        let before = if self.before.is_some() {
            format!("created_at < ${second}")
        } else {
            format!("${second}::timestamptz is null")
        };
        format!("{archived} and {from} and {before}")
    }
}

/// A list of what a user has and may archive, newest first, as a [`ListRequest`] asks for it.
pub struct OwnedList<'a> {
    /// The table with `user_id`, `created_at` and `archived_at`. Its key is called as the table,
    /// with `_id`.
    pub owned: &'a str,
    /// As in [`List`].
    pub table: &'a str,
    pub bytes: &'a str,
    pub columns: &'a str,
}

impl OwnedList<'_> {
    /// Reads a page, and whether there are more rows.
    ///
    /// # Errors
    /// When the request names no user, cursor or time, or Postgres refuses.
    pub async fn read<T>(
        &self,
        pool: &PgPool,
        request: &ListRequest,
    ) -> Result<(Vec<T>, bool), RpcError>
    where
        T: for<'r> FromRow<'r, PgRow>,
    {
        let Self { owned, table, bytes, columns } = *self;
        let key = format!("{owned}_id");
        let user: UserId =
            request.user_id.parse().map_err(|_| RpcError::not_found("User not found"))?;
        let start = PageStart::by_time(request.limit, request.after.as_ref())?;
        let filters = Filters::of(request)?;
        let keys = format!(
            "select {key} from {owned} where user_id = $1 and (created_at, {key}) < ($3, $4) and {}
             order by created_at desc, {key} desc limit $2 + 1",
            filters.conditions("archived_at is null", 5)
        );
        let list = List { keys: &keys, table, by_key: &key, bytes, columns };
        let page = list.read(pool, |query| {
            let query = query.bind(user.uuid()).bind(start.limit).bind(start.time).bind(start.id);
            query.bind(filters.from).bind(filters.before)
        });
        page.await
    }
}

/// A list, in SQL. In all its parts `$1` is whose list it is and `$2` how many rows the page may
/// hold; further parameters are `keys`' own.
pub struct List<'a> {
    /// Selects the keys of rows, in the list's order: one column, `limit $2 + 1`.
    pub keys: &'a str,
    pub table: &'a str,
    /// Finds a row of the table by its key, which follows. Ends in the key's column.
    pub by_key: &'a str,
    /// How large a row is, at least as large as in the answer.
    pub bytes: &'a str,
    pub columns: &'a str,
}

impl List<'_> {
    /// The sizes of rows are added up one by one, and only until the page is full: to know a size
    /// is to read the row.
    fn sql(&self) -> String {
        let Self { keys, table, by_key, bytes, columns } = self;
        format!(
            "with recursive keys as materialized (select array({keys}) as ids),
             page as (
                 select 0 as n, 0::bigint as bytes, 0::bigint as before
                 union all
                 select page.n + 1, sized.bytes, page.before + page.bytes
                 from page, keys, lateral (select ({bytes})::bigint as bytes from {table} where {by_key} = keys.ids[page.n + 1]) sized
                 where page.before < {BYTES_MAX}
             )
             select {columns}, exists (select from page where n > $2 or before >= {BYTES_MAX}) as has_more
             from page, keys, {table}
             where {by_key} = keys.ids[page.n] and page.n between 1 and $2 and page.before < {BYTES_MAX}
             order by page.n"
        )
    }

    /// Reads a page, and whether there are more rows. `bind` binds the parameters.
    ///
    /// # Errors
    /// When Postgres refuses.
    pub async fn read<T>(
        &self,
        pool: &PgPool,
        bind: impl for<'q> FnOnce(
            Query<'q, Postgres, sqlx::postgres::PgArguments>,
        ) -> Query<'q, Postgres, sqlx::postgres::PgArguments>,
    ) -> Result<(Vec<T>, bool), RpcError>
    where
        T: for<'r> FromRow<'r, PgRow>,
    {
        let rows = bind(sqlx::query(AssertSqlSafe(self.sql()))).fetch_all(pool).await?;
        let has_more =
            rows.last().map(|row| row.try_get("has_more")).transpose()?.unwrap_or_default();
        Ok((rows.iter().map(T::from_row).collect::<Result<_, _>>()?, has_more))
    }
}
