//! The system calls that nothing in a Sprite may make: those that reach into the machine beside the namespaces, and those with a long
//! history of holes in the kernel that agents have no use for. All fail with `EPERM`.

use std::{collections::BTreeMap, io};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// Refused whatever their arguments are.
const REFUSED: [i64; 37] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_mbind,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_name_to_handle_at,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_set_mempolicy,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
    libc::SYS_vmsplice,
];
/// Input typed into a terminal by whoever holds it, as if its user had.
const REFUSED_TERMINAL_REQUESTS: [u64; 2] = [libc::TIOCSTI, libc::TIOCLINUX];

fn filter() -> Result<BpfProgram, seccompiler::Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.into_iter().map(|call| (call, Vec::new())).collect();
    let terminal_requests = REFUSED_TERMINAL_REQUESTS.map(|request| {
        let is_it = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, request)?;
        SeccompRule::new(vec![is_it])
    });
    rules.insert(libc::SYS_ioctl, terminal_requests.into_iter().collect::<Result<_, _>>()?);
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let errno = SeccompAction::Errno(libc::EPERM as u32);
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, errno, architecture)?.try_into()?)
}

/// Puts the filter into force for this process and all that it starts, for ever.
pub fn apply() -> io::Result<()> {
    apply_filter(&filter().map_err(io::Error::other)?).map_err(io::Error::other)
}

/// The filter as bubblewrap reads it: the kernel's `struct sock_filter`, one after the other.
pub fn program() -> io::Result<Vec<u8>> {
    let program = filter().map_err(io::Error::other)?;
    let instruction = |filter: seccompiler::sock_filter| {
        let [code_low, code_high] = filter.code.to_ne_bytes();
        let [k0, k1, k2, k3] = filter.k.to_ne_bytes();
        [code_low, code_high, filter.jt, filter.jf, k0, k1, k2, k3]
    };
    Ok(program.into_iter().flat_map(instruction).collect())
}
