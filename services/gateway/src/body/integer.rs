//! Whole numbers, in every spelling that pydantic takes.

use serde_json::Value;

pub fn coerce_integer(value: &Value) -> Result<i64, (&'static str, &'static str)> {
    const PARSING: (&str, &str) =
        ("int_parsing", "Input should be a valid integer, unable to parse string as an integer");
    const FRACTION: (&str, &str) =
        ("int_from_float", "Input should be a valid integer, got a number with a fractional part");
    let whole = |number: f64| {
        if number.fract() == 0.0 && number.abs() < 9.0e15 {
            Ok(number as i64)
        } else {
            Err(FRACTION)
        }
    };
    match value {
        Value::Bool(flag) => Ok(i64::from(*flag)),
        // Larger than any of ours: out of bounds, whichever way.
        Value::Number(number) if number.is_u64() => Ok(number.as_i64().unwrap_or(i64::MAX)),
        Value::Number(number) => {
            number.as_i64().map_or_else(|| whole(number.as_f64().unwrap_or(f64::NAN)), Ok)
        }
        Value::String(text) => {
            let text = text.trim();
            let digits = text
                .split_once('.')
                .filter(|(_, zeros)| zeros.bytes().all(|c| c == b'0'))
                .map_or(text, |(digits, _)| digits);
            digits.parse().map_err(|_| PARSING)
        }
        _ => Err(("int_type", "Input should be a valid integer")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::body::Body;

    #[test]
    fn integers_are_parsed_as_by_pydantic() {
        for (text, expected) in [
            ("60", Ok(60)),
            ("\"60\"", Ok(60)),
            ("60.0", Ok(60)),
            ("\" 60 \"", Ok(60)),
            ("\"60.0\"", Ok(60)),
            ("true", Ok(1)),
        ] {
            assert_eq!(coerce_integer(&serde_json::from_str(text).unwrap()), expected, "{text}");
        }
        for (text, kind) in [
            ("60.5", "int_from_float"),
            ("\"x\"", "int_parsing"),
            ("[]", "int_type"),
            ("1e300", "int_from_float"),
        ] {
            assert_eq!(
                coerce_integer(&serde_json::from_str(text).unwrap()).unwrap_err().0,
                kind,
                "{text}"
            );
        }
        assert_eq!(
            coerce_integer(&serde_json::from_str("18446744073709551615").unwrap()),
            Ok(i64::MAX)
        );
    }

    proptest! {
        #[test]
        fn an_integer_is_the_same_in_every_spelling(number in -1_000_000_000_000_i64..1_000_000_000_000, zeros in 0_usize..4) {
            let point = if zeros == 0 { String::new() } else { format!(".{}", "0".repeat(zeros)) };
            for text in [format!("{number}"), format!("{number}.0"), format!("\"{number}\""), format!("\" {number}{point} \"")] {
                prop_assert_eq!(coerce_integer(&serde_json::from_str(&text).unwrap()), Ok(number), "{}", text);
            }
        }

        #[test]
        fn no_text_panics(text: String, number: f64) {
            let _ = coerce_integer(&text.clone().into());
            let _ = coerce_integer(&number.into());
            let _ = Body(text.into()).fields();
        }
    }
}
