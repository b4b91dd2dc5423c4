//! A role and a schema for each service. For those who own the database: `aod dev`, tests, a
//! deployment's first job.

use sqlx::{PgConnection, Row as _};

use crate::trusted;

/// The services that keep something, by the name of their role and schema.
pub const SERVICES: [&str; 3] = ["auth", "vault", "scheduler"];

/// Creates the service's role and schema in the connected database, or resets the password of an
/// existing role. The role sees its own schema and no other.
///
/// # Errors
/// When the connection may not make roles.
pub async fn provision(
    admin: &mut PgConnection,
    service: &str,
    password: &str,
) -> Result<(), sqlx::Error> {
    let role = quote_identifier(service);
    let exists = sqlx::query("select 1 from pg_roles where rolname = $1")
        .bind(service)
        .fetch_optional(&mut *admin)
        .await?
        .is_some();
    let verb = if exists { "alter" } else { "create" };
    let database: String =
        sqlx::query("select current_database()").fetch_one(&mut *admin).await?.try_get(0)?;
    let database = quote_identifier(&database);
    for sql in [
        format!("{verb} role {role} with login password {}", quote_literal(password)),
        format!("grant connect on database {database} to {role}"),
        format!("create schema if not exists {role} authorization {role}"),
        format!("alter role {role} in database {database} set search_path = {role}"),
        "revoke all on schema public from public".to_owned(),
    ] {
        sqlx::raw_sql(trusted(sql)).execute(&mut *admin).await?;
    }
    Ok(())
}

/// Makes a database that was copied from another deployment this one's own: no Sprite of the other
/// deployment is touched any more. Its sessions can be read and not prompted, and turns that ran
/// are ended. No scheduler may run meanwhile.
///
/// # Errors
/// When the connection may not, or the schema is not that of this release.
pub async fn adopt(admin: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(include_str!("adopt.sql")).execute(admin).await?;
    Ok(())
}

fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
