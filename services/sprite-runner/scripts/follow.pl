#!/usr/bin/perl
# Follows a turn's spool and writes frames to standard output: `<tag> <offset> <length> <checksum>\n` and the bytes.
#   O, E  bytes of stdout, stderr        T  nothing new, but alive
#   X     how the job ended, with the number of bytes of both files that came before; the last frame
# usage: follow.pl DIR [STDOUT_OFFSET STDERR_OFFSET]; without offsets only T and X come, and X counts no bytes
use strict;
use warnings;
use Config;
use Fcntl qw(:flock);

my ($dir, $stdout_offset, $stderr_offset) = @ARGV;
my $supervise = $0 =~ s/[^\/]*$/supervise.pl/r;
chdir $dir or die "follow: $dir: $!\n";
my @spool = defined $stdout_offset ? (["O", "stdout", $stdout_offset, undef], ["E", "stderr", $stderr_offset, undef]) : ();

# Woken by inotify, which Perl has no name for; where that fails, by a short sleep.
my %numbers = ("x86_64" => [294, 254], "aarch64" => [26, 27]);
my ($machine) = $Config{archname} =~ /^(x86_64|aarch64)/;
my $wake;
if ($machine) {
    my $fd = syscall($numbers{$machine}[0], 0);
    my ($here, $modified_created_moved_to) = (".", 0x2 | 0x100 | 0x80);
    open($wake, "<&=", $fd) if $fd >= 0 && syscall($numbers{$machine}[1], $fd, $here, $modified_created_moved_to) >= 0;
}

sub frame {
    my ($tag, $offset, $data) = @_;
    my $bytes = sprintf("%s %d %d %u\n", $tag, $offset, length $data, unpack("%32C*", $data)) . $data;
    while (length $bytes) {
        my $written = syswrite(STDOUT, $bytes);
        exit 1 unless defined $written;
        substr($bytes, 0, $written) = "";
    }
}

sub status {
    open(my $file, "<", "exit") or return undef;
    my $line = <$file>;
    $line = "lost" unless defined $line;
    chomp $line;
    return $line;
}

# Nobody holds the lock of a job that was started: its supervisor is gone.
sub is_lost {
    return 0 unless -e "started";
    open(my $lock, "<", "lock") or return 0;
    return flock($lock, LOCK_SH | LOCK_NB);
}

my ($silent_since, $checked) = (time, time);
my ($status, $whole);
while (1) {
    # The status comes after the spool's last byte.
    if (!defined $status && defined($status = status())) {
        $whole = 0;
        $whole += -s $_->[1] || 0 for @spool;
    }
    my $moved = 0;
    for my $file (@spool) {
        unless ($file->[3]) {
            # Not into the list itself: a handle that failed to open is true all the same.
            open(my $handle, "<:raw", $file->[1]) or next;
            sysseek($handle, $file->[2], 0) or die "follow: $file->[1]: $!\n";
            $file->[3] = $handle;
        }
        my $count = sysread($file->[3], my $data, 65536);
        next unless $count;
        frame($file->[0], $file->[2], $data);
        $file->[2] += $count;
        $moved = 1;
    }
    my $read = 0;
    $read += $_->[2] for @spool;
    if (defined $status && $read >= $whole) {
        frame("X", $read, $status);
        exit 0;
    }
    if ($moved) {
        $silent_since = time;
        next;
    }
    if (time > $checked) {
        $checked = time;
        # It says what became of the job.
        system($^X, $supervise, $dir) if is_lost() && !defined status();
    }
    if (time - $silent_since >= 5) {
        frame("T", 0, "");
        $silent_since = time;
    }
    if ($wake) {
        my $ready = "";
        vec($ready, fileno($wake), 1) = 1;
        sysread($wake, my $events, 65536) if select($ready, undef, undef, 1) > 0;
    } else {
        select(undef, undef, undef, 0.02);
    }
}
