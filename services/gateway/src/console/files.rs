//! The console's files.

use axum::{
    extract::Path,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};

/// Path and content of each file, from `console/dist`. A file may have a compressed twin, named
/// with `.br` at its end.
const FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/console_files.rs"));

/// Files with a hash of their content in their name are in this folder.
const HASHED: &str = "assets/";
const PAGE: &str = "index.html";
/// Shown where the gateway was built without the console.
const MISSING: &str = "<!doctype html><html lang=en><meta charset=utf-8><title>Agent on Demand</title>\
    <h1>The console is not part of this build</h1>\
    <p>This gateway was compiled before the console was built. Install Node.js 20 or later with npm, run <code>make build</code> in the \
    repository, and restart the gateway.</p><p>The API works without it: see <a href=/docs>/docs</a>.</p>";

/// The console's one page. Its script shows what the address names.
pub async fn page(headers: HeaderMap) -> Response {
    match find(PAGE) {
        Some(_) => answer(PAGE, &headers),
        None => {
            (StatusCode::NOT_FOUND, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], MISSING)
                .into_response()
        }
    }
}

pub async fn file(Path(path): Path<String>, headers: HeaderMap) -> Response {
    let is_page = !path.rsplit('/').next().is_some_and(|name| name.contains('.'));
    if is_page { page(headers).await } else { answer(&path, &headers) }
}

fn find(path: &str) -> Option<&'static [u8]> {
    FILES
        .binary_search_by_key(&path, |(name, _)| name)
        .ok()
        .and_then(|index| FILES.get(index))
        .map(|(_, content)| *content)
}

fn answer(path: &str, headers: &HeaderMap) -> Response {
    let Some(plain) = find(path).filter(|_| !path.ends_with(".br")) else {
        return (StatusCode::NOT_FOUND, "Not found").into_response();
    };
    let compressed = find(&format!("{path}.br")).filter(|_| accepts_brotli(headers));
    let mut response = compressed.unwrap_or(plain).into_response();
    let caching =
        if path.starts_with(HASHED) { "public, max-age=31536000, immutable" } else { "no-cache" };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type(path)));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
    headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if compressed.is_some() {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("br"));
    }
    response
}

fn accepts_brotli(headers: &HeaderMap) -> bool {
    let values =
        headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|coding| {
        let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
        name.trim() == "br" && !matches!(weight.trim(), "q=0" | "q=0.0" | "q=0.00" | "q=0.000")
    })
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit('.').next().unwrap_or_default() {
        "html" => "text/html; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "svg" => "image/svg+xml",
        "txt" => "text/plain; charset=utf-8",
        "webmanifest" => "application/manifest+json",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brotli_is_sent_only_where_it_is_accepted() {
        let accepts = |value: &'static str| {
            accepts_brotli(&HeaderMap::from_iter([(
                header::ACCEPT_ENCODING,
                HeaderValue::from_static(value),
            )]))
        };
        assert!(accepts("gzip, deflate, br, zstd") && accepts("br;q=0.5"));
        assert!(!accepts("gzip") && !accepts("br;q=0") && !accepts_brotli(&HeaderMap::new()));
    }

    #[test]
    fn the_table_of_files_is_sorted() {
        assert!(FILES.is_sorted_by_key(|(name, _)| *name));
    }
}
