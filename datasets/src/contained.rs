//! Other people's code on a stranger's data: what it does not expect it may answer with a panic, which then is an error.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Whether a panic of this thread will be an error, so that a panic hook need not tell of it.
pub fn is_contained() -> bool {
    DEPTH.try_with(|depth| depth.get() > 0).unwrap_or(false)
}

/// Runs `run`; if it panics, gives what the panic says. Whatever `run` changes must not be used after that.
pub(crate) fn contained<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    DEPTH.set(DEPTH.get().saturating_add(1));
    let result = catch_unwind(AssertUnwindSafe(run));
    DEPTH.set(DEPTH.get().saturating_sub(1));
    result.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no reason given").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_text() {
        assert_eq!(contained(|| 7), Ok(7));
        let inner = contained(|| -> u8 {
            assert!(is_contained());
            panic!("number {}", 5)
        });
        assert_eq!((inner, is_contained()), (Err("number 5".to_owned()), false));
    }
}
