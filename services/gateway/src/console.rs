//! The web console under `/console`: its files, embedded at build time, and the sign-in of
//! browsers.
//!
//! The console calls the public API like any client, but authenticates with a cookie instead of an
//! API key, see [`sign_in`].

mod files;
pub mod sign_in;

use axum::{Router, response::Redirect, routing};

use crate::App;

/// What a browser may do on the console's pages: run and load what this gateway serves, and nothing
/// else.
pub const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
     connect-src 'self'; manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; \
     require-trusted-types-for 'script'; trusted-types dompurify";

pub fn routes() -> Router<App> {
    Router::new()
        .route("/console", routing::get(|| async { Redirect::permanent("/console/") }))
        .route(
            "/console/session",
            routing::get(sign_in::current).post(sign_in::sign_in).delete(sign_in::sign_out),
        )
        .route("/console/", routing::get(files::page))
        .route("/console/{*path}", routing::get(files::file))
}
