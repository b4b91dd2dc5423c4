//! Paths, for the OpenAPI document.

use utoipa::IntoParams;

#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "describes a path")]
pub struct IdParams {
    /// The resource's id
    id: String,
}
